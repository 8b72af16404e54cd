"""What the pass that plans and the workers that embed both need to read CSV and Parquet alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from genembed.errors import InputError, missing_extra
from genembed.records import BATCH_ROWS, Columns, plain_rows

Stream = Any
"""An open file of bytes: every file system and every compression has a class of its own for it."""


class CsvLines:
    """Hands a CSV reader its lines, and keeps their bytes."""

    def __init__(self, stream: Iterable[bytes], *, beginning: bool = False) -> None:
        self._stream = stream
        self._taken: list[bytes] = []
        self._first = beginning  # of the file, where a byte-order mark may stand

    def __iter__(self) -> Iterator[str]:
        """Yield the lines; bytes that are not UTF-8 become surrogates, which only their row is rejected for."""
        for line in self._stream:
            self._taken.append(line)
            yield line.decode("utf-8-sig" if self._first else "utf-8", errors="surrogateescape")
            self._first = False

    def take(self) -> bytes:
        """Return the bytes that were read since this was last asked."""
        content, self._taken = b"".join(self._taken), []
        return content


def parquet_rows(
    stream: Stream, name: str, columns: Columns, *, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows `start` to `stop` of a Parquet file with their numbers; row groups that hold none of them are not read.

    Raises:
        InputError: If it is not Parquet, or lacks a column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra("jobs", "pyarrow") from error
    wanted = [column for column in (columns.text, columns.id) if column is not None]
    try:
        file = parquet.ParquetFile(stream)
        columns.check(file.schema_arrow.names, name)
        stop, first = file.metadata.num_rows if stop is None else stop, 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < stop and first + rows > start:
                place = first
                for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=wanted):
                    skipped = min(max(start - place, 0), batch.num_rows)
                    part = batch.slice(skipped, max(min(batch.num_rows, stop - place) - skipped, 0))
                    yield from enumerate(plain_rows(part, name), start=place + skipped)
                    place += batch.num_rows
            first += rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read as Parquet: {error}") from error


def row_bytes(row: Mapping[str, Any]) -> bytes:
    """Return bytes that are others for other values."""
    return repr(sorted(row.items())).encode("utf-8", errors="surrogatepass")
