"""A finished job as a Lance dataset instead of Parquet files alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genembed.errors import JobError, missing_extra
from genembed.files import make_durable
from genembed.jobs.folder import JobFolder

_TABLE = "vectors"


def write_lance(folder: JobFolder, shards: Sequence[Path]) -> None:
    """Copy the shards into one Lance dataset, `vectors.lance` in the job's folder, which appears when it is complete.

    A shard is read at a time. The Parquet files stay: they are what the manifest vouches for.

    Raises:
        JobError: If it cannot be written.
        MissingExtraError: If lancedb is not installed.
    """
    try:
        import lancedb
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra("index", error.name or "lancedb") from error
    if folder.lance.exists():
        return  # it is renamed into place: where it is, it is whole
    building = folder.root / ".tmp-lance"
    shutil.rmtree(building, ignore_errors=True)  # of a job that was killed here

    def batches() -> Iterator[Any]:
        for path in shards:
            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches()

    try:
        with parquet.ParquetFile(shards[0]) as first:
            schema = first.schema_arrow
        lancedb.connect(building).create_table(_TABLE, pyarrow.RecordBatchReader.from_batches(schema, batches()))
        make_durable(building)
        (building / f"{_TABLE}.lance").rename(folder.lance)
        building.rmdir()
    except (OSError, ValueError, RuntimeError) as error:
        raise JobError(f"{folder.lance} could not be written: {error}. The shards are all there; go on with the same command.") from error
