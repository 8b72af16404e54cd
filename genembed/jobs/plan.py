"""Which rows belong to which shard, and where they stand: one pass over the input, before anything is embedded."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from genembed.errors import CheckpointError, ConfigurationError, InputError
from genembed.jobs.formats import CsvLines, parquet_rows, row_bytes
from genembed.jobs.inputs import FORMATS, InputFile
from genembed.jobs.storage import made_of
from genembed.records import Columns, allow_long_fields, bounded_lines, json_object

FORMAT_VERSION = 1
"""Of the plan's file; a reader refuses another one."""
_FILE = Path("plan.json")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows of one file that stand one after the other."""

    file: int
    """Position of the file in the plan."""
    start: int
    """First byte of the uncompressed file; of Parquet the first row."""
    stop: int
    """Byte or row after the last."""
    line: int
    """Line of the first row, from 1; of Parquet its number, from 1."""
    rows: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The rows that one output file holds; the unit of work, of resuming and of loss."""

    index: int
    first_row: int
    """Number of its first row in the whole corpus, from 0."""
    rows: int
    spans: tuple[Span, ...]
    sha256: str
    """Of the rows' bytes in the input (of Parquet: of their values), so that no other rows are taken for them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A corpus, cut into shards."""

    files: tuple[InputFile, ...]
    hashes: tuple[str, ...]
    """SHA-256 of each file, uncompressed."""
    headers: tuple[tuple[str, ...], ...]
    """Column names of each CSV file; empty for others."""
    columns: Columns
    shard_rows: int
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """Rows of the whole corpus."""
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as its file holds it."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """Read the plan of a file.

        Raises:
            CheckpointError: If it is damaged, or of another version.
        """
        try:
            if value["format_version"] != FORMAT_VERSION:
                raise CheckpointError(f"plan.json: format_version {value['format_version']!r} is not {FORMAT_VERSION}.")
            plan = cls(
                files=tuple(made_of(InputFile, file, _FILE) for file in value["files"]),
                hashes=tuple(value["hashes"]),
                headers=tuple(map(tuple, value["headers"])),
                columns=made_of(Columns, value["columns"], _FILE),
                shard_rows=value["shard_rows"],
                shards=tuple(_shard(one) for one in value["shards"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"plan.json: is damaged ({error!r:.200}); start the job in another folder.") from error
        if not plan.holds_together:
            raise CheckpointError(
                "plan.json: is damaged: its files, shards and rows do not belong together; start the job in another folder."
            )
        return plan

    @property
    def holds_together(self) -> bool:
        """Whether files and shards fit one another: a plan that was elsewhere may say anything."""
        first, known = 0, [*self.hashes, *(name for header in self.headers for name in header)]
        fits = len(self.files) == len(self.hashes) == len(self.headers) and all(isinstance(one, str) for one in known)
        fits &= isinstance(self.shard_rows, int) and all(file.file_format in FORMATS for file in self.files)
        for place, shard in enumerate(self.shards):
            spans = shard.spans
            fits &= (shard.index, shard.first_row, shard.rows) == (place, first, sum(span.rows for span in spans))
            fits &= all(0 <= span.file < len(self.files) and 0 <= span.start <= span.stop and span.rows >= 0 for span in spans)
            first += shard.rows
        return fits


def _shard(value: dict[str, Any]) -> Shard:
    spans = tuple(made_of(Span, span, _FILE) for span in value["spans"])
    return made_of(Shard, {**value, "spans": spans}, _FILE)


class _Cutter:
    """Takes the rows of all files in order and closes a shard whenever it is full."""

    def __init__(self, shard_rows: int) -> None:
        self.shards: list[Shard] = []
        self._room = shard_rows
        self._rows = self._first = 0
        self._spans: list[Span] = []
        self._digest = hashlib.sha256()
        self._open: Span | None = None

    def add(self, file: int, start: int, stop: int, line: int, content: bytes, rows: int = 1) -> None:
        """Add bytes of a file that hold so many rows (none: blank lines)."""
        span = self._open
        if span is None or span.file != file:
            self._close_span()
            span = Span(file=file, start=start, stop=start, line=line, rows=0)
        self._open = Span(file=file, start=span.start, stop=stop, line=span.line, rows=span.rows + rows)
        self._digest.update(content)
        self._rows += rows
        if self._rows == self._room:
            self.close()

    def close(self) -> None:
        """Close the shard that is open, if it has rows."""
        self._close_span()
        if self._rows:
            shard = Shard(
                index=len(self.shards),
                first_row=self._first,
                rows=self._rows,
                spans=tuple(self._spans),
                sha256=self._digest.hexdigest(),
            )
            self.shards.append(shard)
            self._first += self._rows
        self._rows, self._spans, self._digest = 0, [], hashlib.sha256()

    def _close_span(self) -> None:
        if self._open is not None:
            self._spans.append(self._open)
            self._open = None


def make_plan(files: Sequence[InputFile], columns: Columns, shard_rows: int, *, show_progress_bar: bool = False) -> Plan:
    """Read all files once, and cut their rows into shards of `shard_rows`, the last one smaller.

    Raises:
        ConfigurationError: If `shard_rows` is not positive.
        InputError: If a file is not what its name says, or lacks a column.
    """
    if shard_rows < 1:
        raise ConfigurationError(f"shard_rows={shard_rows}: a shard has at least one row.")
    cutter, hashes, headers = _Cutter(shard_rows), [], []
    total = sum(file.size for file in files)
    with tqdm(total=total, desc="planning", unit="B", unit_scale=True, delay=1, leave=False, disable=not show_progress_bar) as bar:
        for index, file in enumerate(files):
            digest, header = _SCANNERS[file.file_format](cutter, index, file, columns)
            hashes.append(digest)
            headers.append(header)
            bar.update(file.size)
    cutter.close()
    return Plan(
        files=tuple(files),
        hashes=tuple(hashes),
        headers=tuple(headers),
        columns=columns,
        shard_rows=shard_rows,
        shards=tuple(cutter.shards),
    )


Scanned = tuple[str, tuple[str, ...]]
"""SHA-256 of a file, and the header of a CSV."""


def _scan_lines(cutter: _Cutter, index: int, file: InputFile, columns: Columns) -> Scanned:
    """Every line of text is a row; of JSON lines those that are not blank."""
    digest, place, first = hashlib.sha256(), 0, file.file_format == "jsonl"
    with file.open() as stream:
        for number, line in enumerate(bounded_lines(stream, file.url), start=1):
            row = bool(line.strip()) or file.file_format == "txt"
            if row and first:
                _check_first(line, f"{file.url}, line {number}", columns)
                first = False
            digest.update(line)
            cutter.add(index, place, place + len(line), number, line, int(row))
            place += len(line)
    return digest.hexdigest(), ()


def _check_first(line: bytes, place: str, columns: Columns) -> None:
    """Refuse a corpus whose first row lacks a column: the name is wrong then, not the row."""
    try:
        row = json_object(line.decode("utf-8-sig"), place)
    except (InputError, UnicodeDecodeError):
        return  # this row alone is rejected
    columns.check(list(row), place)


def _scan_csv(cutter: _Cutter, index: int, file: InputFile, columns: Columns) -> Scanned:
    digest, place = hashlib.sha256(), 0
    allow_long_fields()
    with file.open() as stream:
        lines = CsvLines(bounded_lines(stream, file.url), beginning=True)
        reader = csv.reader(lines, strict=True)
        try:
            header = tuple(next(reader, ()))
            content = lines.take()
            digest.update(content)
            place = len(content)
            columns.check(header, file.url)
            line = reader.line_num + 1
            for values in reader:
                content = lines.take()
                digest.update(content)
                cutter.add(index, place, place + len(content), line, content, int(bool(values)))
                place, line = place + len(content), reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{file.url}, line {reader.line_num}: not valid CSV: {error}.") from error
    return digest.hexdigest(), header


def _scan_parquet(cutter: _Cutter, index: int, file: InputFile, columns: Columns) -> Scanned:
    with file.open() as stream:
        for place, row in parquet_rows(stream, file.url, columns):
            cutter.add(index, place, place + 1, place + 1, row_bytes(row))
    return file.sha256(), ()


_SCANNERS: dict[str, Callable[[_Cutter, int, InputFile, Columns], Scanned]] = {
    "txt": _scan_lines,
    "jsonl": _scan_lines,
    "csv": _scan_csv,
    "parquet": _scan_parquet,
}
