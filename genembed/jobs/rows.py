"""The rows of one shard, read where the plan says they stand; what cannot be embedded is told apart here."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from genembed.errors import InputError, JobError
from genembed.jobs.formats import CsvLines, Stream, parquet_rows, row_bytes
from genembed.jobs.inputs import InputFile
from genembed.jobs.plan import Plan, Shard, Span
from genembed.records import Columns, allow_long_fields, is_unicode, json_object


class Row(NamedTuple):
    """One row of the corpus."""

    number: int
    """In the whole corpus, from 0."""
    id: str
    """Value of the id column; without one the row's number."""
    text: str
    place: str
    """File and line."""


class Reject(NamedTuple):
    """A row that cannot be embedded."""

    number: int
    id: str | None
    place: str
    reason: str


_Found = tuple[int, dict[str, Any] | str]
"""Line of a row, and its values; or why it has none."""


def read_shard(plan: Plan, shard: Shard) -> tuple[list[Row], list[Reject]]:
    """Read the rows of a shard, those that can be embedded and those that cannot, each in the order of the input.

    Raises:
        JobError: If the input cannot be read, or other rows stand there than when the job was planned.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    digest = hashlib.sha256()
    number = shard.first_row
    for span in shard.spans:
        file = plan.files[span.file]
        with file.open() as stream:
            for line, values in _READERS[file.file_format](stream, file, plan, span, digest):
                taken = _taken(values, plan.columns, number, line, file)
                (rows if isinstance(taken, Row) else rejects).append(taken)  # type: ignore[arg-type]
                number += 1
    if digest.hexdigest() != shard.sha256 or number != shard.first_row + shard.rows:
        names = ", ".join(dict.fromkeys(plan.files[span.file].url for span in shard.spans))
        raise JobError(
            f"shard {shard.index}: {names} no longer holds the rows that were there when the job was planned; bring the file back, or "
            "embed it as it is now in another folder."
        )
    return rows, rejects


def _taken(values: dict[str, Any] | str, columns: Columns, number: int, line: int, file: InputFile) -> Row | Reject:
    unit = "row" if file.file_format == "parquet" else "line"
    place = f"{file.url}, {unit} {line}"
    if isinstance(values, str):
        return Reject(number, None, place, values)
    try:
        columns.check(list(values), place)
        record = columns.record(values, number, line=line, place=place)
    except InputError as error:
        return Reject(number, None, place, str(error).removeprefix(f"{place}: "))
    if not is_unicode(record.text):
        return Reject(number, _printable(record.id), place, "the text is not Unicode: it has bytes that are not UTF-8, or lone surrogates.")
    return Row(number, record.id, record.text, place)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _span_bytes(stream: Stream, span: Span, digest: Any) -> bytes:
    stream.seek(span.start)
    content: bytes = stream.read(span.stop - span.start)
    digest.update(content)
    return content


def _read_lines(stream: Stream, file: InputFile, plan: Plan, span: Span, digest: Any) -> Iterator[_Found]:
    for line, raw in enumerate(io.BytesIO(_span_bytes(stream, span, digest)), start=span.line):
        try:
            content = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield line, f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8."
            continue
        if file.file_format == "txt":
            yield line, {plan.columns.text: content.removesuffix("\n").removesuffix("\r")}
        elif raw.strip():  # of bytes, as the plan counted them: a line of no-break spaces is a row
            try:
                yield line, json_object(content, "")
            except InputError as error:
                yield line, str(error).removeprefix(": ")


def _read_csv(stream: Stream, file: InputFile, plan: Plan, span: Span, digest: Any) -> Iterator[_Found]:
    allow_long_fields()
    header, line = plan.headers[span.file], span.line
    reader = csv.reader(CsvLines(io.BytesIO(_span_bytes(stream, span, digest))), strict=True)
    try:
        for values in reader:
            if values and len(values) != len(header):
                yield line, f"{len(values)} fields, but the header has {len(header)}; put quotes around a text that holds commas."
            elif values:
                yield line, dict(zip(header, values, strict=True))
            line = span.line + reader.line_num
    except csv.Error as error:
        raise JobError(f"{file.url}, line {span.line + reader.line_num}: not valid CSV any more: {error}.") from error


def _read_parquet(stream: Stream, file: InputFile, plan: Plan, span: Span, digest: Any) -> Iterator[_Found]:
    for number, row in parquet_rows(stream, file.url, plan.columns, start=span.start, stop=span.stop):
        digest.update(row_bytes(row))
        yield number + 1, row


_READERS: dict[str, Callable[[Stream, InputFile, Plan, Span, Any], Iterator[_Found]]] = {
    "txt": _read_lines,
    "jsonl": _read_lines,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
