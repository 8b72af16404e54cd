"""Rows of files with the columns that are kept beside their texts, for filters."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genembed.errors import ConfigurationError, InputError, missing_extra
from genembed.files import STANDARD_STREAM, decoded_lines, read_texts
from genembed.records import Record, plain_rows

try:
    import pyarrow
    from pyarrow import parquet
except ModuleNotFoundError as missing:
    raise missing_extra("index", "pyarrow") from missing

OWN_COLUMNS = ("reference", "summary", "text", "path", "kind", "content_hash", "vector", "steps", "truncated")
"""Columns that every index has; a kept one cannot have their names."""

Row = Mapping[str, Any]


def check_names(names: Sequence[str]) -> None:
    """Refuse columns that the table cannot hold beside its own.

    Raises:
        ConfigurationError: With the name and the way out.
    """
    seen = set(OWN_COLUMNS)
    for name in names:
        if name.lower() in seen or name.startswith("_") or "." in name or not name:
            raise ConfigurationError(
                f"--metadata {name}: the index has a column of that name, or cannot have one (a leading underscore, a dot); rename the "
                "column in the file."
            )
        seen.add(name.lower())


def rows_with_metadata(
    source: Path, names: Sequence[str], *, file_format: str | None, text_column: str | None, id_column: str | None
) -> Iterator[tuple[Record, Row]]:
    """Read the texts of a file of rows, each with the values of other columns.

    A CSV file has no types: there a column is read as whole numbers or decimal ones where all of its values are such.

    Args:
        source: The file, or `-` for stdin.
        names: Columns that are kept.
        file_format: As for `read_texts`, like what follows.
        text_column: Column of the text.
        id_column: Column of the id.

    Raises:
        ConfigurationError: If the file has no columns.
        InputError: If a column is missing, or holds more than plain values.
    """
    options = {"text_column": text_column, "id_column": id_column}
    if not names:
        yield from ((record, {}) for record in read_texts(source, file_format=file_format, **options))
        return
    with _on_disk(source) as path:
        kind = file_format or (_beginning(path) if path != source else path.suffix.lower().removeprefix("."))
        records = read_texts(path, file_format=file_format or (kind if path != source else None), **options)
        if kind not in _READERS:
            raise ConfigurationError(f"--metadata {' '.join(names)}: {source} is read as text lines, which have no columns; leave it out.")
        rows = list(zip(records, _READERS[kind](path, names), strict=True))
        _check(source, names, rows)
        yield from _typed(names, rows) if kind == "csv" else rows


@contextmanager
def _on_disk(source: Path) -> Iterator[Path]:
    """Give the file, or a copy of stdin, which can be read only once; messages about it say stdin."""
    if str(source) != STANDARD_STREAM:
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "stdin")
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            yield copy
        except InputError as error:
            raise InputError(str(error).replace(str(copy), "stdin"), row=error.row) from error


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return "jsonl" if file.read(100).lstrip(b"\xef\xbb\xbf \t").startswith(b"{") else "txt"


def _json_rows(path: Path, names: Sequence[str]) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from (_only(names, json.loads(line)) for line in decoded_lines(file, str(path)) if line.strip())


def _csv_rows(path: Path, names: Sequence[str]) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = csv.reader(decoded_lines(file, str(path)), strict=True)
        header = next(lines, [])
        yield from (_only(names, dict(zip(header, values, strict=True))) for values in lines if values)


def _parquet_rows(path: Path, names: Sequence[str]) -> Iterator[Row]:
    table = parquet.ParquetFile(path)
    for batch in table.iter_batches(columns=[name for name in names if name in table.schema_arrow.names]):
        rows = plain_rows(batch, str(path))
        yield from rows or [{}] * batch.num_rows


def _only(names: Sequence[str], row: Row) -> Row:
    return {name: row[name] for name in names if name in row}


_READERS = {"jsonl": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}
"""`read_texts` goes through the same file beside them, and refuses what is not readable as that."""


def _check(source: Path, names: Sequence[str], rows: Sequence[tuple[Record, Row]]) -> None:
    for name in names:
        if rows and not any(name in row for _, row in rows):
            raise InputError(f"{source}: no row has a column {name!r}, which --metadata names.")
        for record, row in rows:
            if isinstance(row.get(name), (list, dict, bytes)):
                raise InputError(
                    f"{source}, line {record.line}: column {name!r} holds {row[name]!r:.60}; kept for filters are text, numbers, truth "
                    "values and dates."
                )


def _typed(names: Sequence[str], rows: Sequence[tuple[Record, Row]]) -> Iterator[tuple[Record, Row]]:
    """Read the columns of a CSV file as numbers where they are; an empty field is no value."""
    columns = [_numbers([row[name] or None for _, row in rows]) for name in names]
    for (record, _), values in zip(rows, zip(*columns, strict=True), strict=True):
        yield record, dict(zip(names, values, strict=True))


def _numbers(values: list[str | None]) -> list[Any]:
    if any(len(value) > 1 and value.startswith("0") and not value.startswith("0.") for value in values if value):
        return values  # a number with a leading zero is a code, such as a postcode
    column = pyarrow.array(values, type=pyarrow.string())
    for kind in (pyarrow.int64(), pyarrow.float64()):
        try:
            return list(column.cast(kind).to_pylist())
        except pyarrow.ArrowInvalid:
            continue
    return values
