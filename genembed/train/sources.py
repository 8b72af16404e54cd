"""Rows of the files that training reads: JSON lines, Parquet, and data sets of Hugging Face, one row after the other."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from genembed.errors import ConfigurationError, DataError, InputError, missing_extra
from genembed.records import plain_rows

HUB = "hf:"
"""Begins the path of a data set on the hub: `hf:NAME`, or `hf:NAME:SPLIT`."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""File types that are read; a folder is taken as one that `datasets` has saved."""

_HUB_SPLIT = "train"
_BATCH_ROWS = 64
"""Rows of a Parquet file that are Python objects at one time."""


class RowError(Exception):
    """A row that cannot be used; it is left out and counted under its reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        """What rows with the same fault share."""


Row = dict[str, Any] | RowError
"""The columns of a row, or why there are none."""

Select = Callable[[Sequence[str]], list[str]]
"""Is told the columns of a table and returns those to read."""


def read_rows(path: str, select: Select) -> Iterator[tuple[int, Row]]:
    """Read the rows of a file, each with its line, or in a table with its number, from 1.

    Args:
        path: A `.jsonl`, `.jsonl.gz` or `.parquet` file, a folder written by `save_to_disk`, or `hf:NAME[:SPLIT]`.
        select: Called once before the first row of a table, so that wide columns nobody needs stay unread; JSON lines have no table.

    Raises:
        ConfigurationError: If there is no such file or data set.
        DataError: If a file as a whole is broken.
        MissingExtraError: If the library that reads it is not installed.
    """
    if path.startswith(HUB):
        return _hub_rows(path, select)
    if Path(path).is_dir():
        return _saved_rows(path, select)
    if not Path(path).exists():
        raise ConfigurationError(f"{path}: no such file.")
    if path.endswith(".parquet"):
        return _parquet_rows(path, select)
    if path.endswith(SUFFIXES):
        return _json_rows(path)
    raise ConfigurationError(
        f"{path}: file type {Path(path).suffix!r} is unknown; known are {', '.join(SUFFIXES)}, "
        f"a folder written by save_to_disk, and {HUB}NAME for a data set of the hub."
    )


def _json_rows(path: str) -> Iterator[tuple[int, Row]]:
    line = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb") as file:
            for line, content in enumerate(file, start=1):
                if content.strip():
                    yield line, _json_row(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: broken gzip after line {line}: {error}; fetch the file again.") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _json_row(content: bytes) -> Row:
    try:
        row = json.loads(content.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"byte {error.start + 1} is 0x{content[error.start]:02x}")
    except json.JSONDecodeError as error:
        return RowError("invalid JSON", f"character {error.pos + 1}: {error.msg}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return RowError("invalid JSON", str(error))
    return row if isinstance(row, dict) else RowError("not a JSON object", f"{row!r:.60}")


def _parquet_rows(path: str, select: Select) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra("train", "pyarrow") from error
    try:
        with parquet.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=select(table.schema_arrow.names))
            yield from enumerate((row for batch in batches for row in plain_rows(batch, path)), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError, InputError) as error:
        raise DataError(str(error) if isinstance(error, InputError) else f"{path}: cannot be read as Parquet: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _saved_rows(path: str, select: Select) -> Iterator[tuple[int, Row]]:
    datasets = _datasets()
    try:
        table = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be read as a folder written by save_to_disk: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        raise ConfigurationError(
            f"{path}: holds the splits {', '.join(table)}; name the folder of one, such as {Path(path) / next(iter(table))}"
        )
    yield from enumerate(table.select_columns(select(table.column_names)), start=1)


def _hub_rows(path: str, select: Select) -> Iterator[tuple[int, Row]]:
    datasets = _datasets()
    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        table = datasets.load_dataset(name, split=split or _HUB_SPLIT, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigurationError(f"{path}: cannot be opened: {error}") from error
    if table.column_names is not None:  # some data sets only tell with their first row
        table = table.select_columns(select(table.column_names))
    yield from enumerate(table, start=1)


def _datasets() -> Any:
    try:
        import datasets  # type: ignore[import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise missing_extra("train", "datasets") from error
    return datasets
