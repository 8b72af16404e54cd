"""A finished job, read back: its rows, and what became of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from genembed.errors import ConfigurationError, JobError, missing_extra
from genembed.jobs.folder import JobFolder
from genembed.jobs.rows import Row, read_shard
from genembed.jobs.storage import file_hash


@dataclass(frozen=True)
class EmbeddedRows:
    """The rows of one shard that were embedded, in their order."""

    rows: list[Row]
    vectors: np.ndarray
    """One for each row, in the job's numbers."""
    steps: np.ndarray
    truncated: np.ndarray


def read_embedded(folder: JobFolder) -> Iterator[EmbeddedRows]:
    """Yield the rows of a finished job with their vectors, a shard at a time; every byte is checked against the manifest.

    The texts come from the job's input, which has to be as it was.

    Raises:
        ConfigurationError: If there is no job, or it is not finished.
        JobError: If a shard or the input is not what it was.
    """
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra("jobs", "pyarrow") from error
    folder.read_description()
    if not folder.manifest.exists():
        raise ConfigurationError(f"{folder.root}: the job is not finished; go on with it first (genembed job status {folder.root}).")
    plan = folder.read_plan()
    for shard in plan.shards:
        receipt, path = folder.read_receipt(shard.index), folder.shard_file(shard.index)
        if file_hash(path) != receipt.sha256:
            raise JobError(f"{path}: its bytes are not those that were written; see: genembed job verify {folder.root}")
        rejected = {reject["number"] for reject in folder.read_rejects(shard.index)} if receipt.rejects else set()
        rows = [row for row in read_shard(plan, shard)[0] if row.number not in rejected]
        table = parquet.read_table(path)
        flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        yield EmbeddedRows(
            rows=rows,
            vectors=flat.reshape(len(rows), table.schema.field("vector").type.list_size),
            steps=table["steps"].to_numpy().astype(np.int64),
            truncated=table["truncated"].to_numpy().astype(np.bool_),
        )
