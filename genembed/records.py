"""Rows of outside files, and what may be wrong with one."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from genembed.errors import InputError

ROW_BYTES = 64 << 20
"""Longest line, or field of a CSV file, that is read: more is a file of another kind, or a few compressed bytes meant to fill memory."""
BATCH_ROWS = 128
"""Rows of a Parquet file that are in memory at a time: a value that is stored once may stand in every one of them."""

TEXT_COLUMN = "text"
"""Column of the text where none is named."""


class Record(NamedTuple):
    """One text of a file."""

    id: str
    """Value of the id column; without one the number of the row, from 0."""
    text: str
    line: int
    """Line of the file, or row of a Parquet file, from 1."""


@dataclass(frozen=True)
class Columns:
    """Which fields of a row are its text and its id."""

    text: str
    id: str | None
    """None: the number of the row."""
    option: str | None = None
    """The option that names both, for messages; None where each has its own."""

    def check(self, names: Sequence[str], place: str) -> None:
        """Refuse a file or row that lacks one of the columns.

        Args:
            names: Of the columns that are there.
            place: File, and line where there is one, for the message.

        Raises:
            InputError: With the names that are there.
        """
        for column, option in ((self.text, "--text-column"), (self.id, "--id-column")):
            if column is not None and column not in names:
                raise InputError(
                    f"{place}: no column {column!r}; there are: {', '.join(names) or 'none'}. Name one with {self.option or option}."
                )

    def record(self, row: Mapping[str, Any], number: int, *, line: int, place: str) -> Record:
        """Take text and id out of one row.

        Args:
            row: Values by column.
            number: Of the row; its id where no column says one.
            line: Of the file, from 1.
            place: File and line, for the message.

        Raises:
            InputError: If the text is no text, or the id no string or integer.
        """
        text, identifier = row[self.text], number if self.id is None else row[self.id]
        if not isinstance(text, str):
            raise InputError(
                f"{place}: column {self.text!r} holds {text!r:.80}, which is not text; drop the row or write the value as a string."
            )
        if not isinstance(identifier, (str, int)) or isinstance(identifier, bool) or not is_unicode(str(identifier)):
            raise InputError(f"{place}: column {self.id!r} holds {identifier!r:.80}; an id is a string or an integer.")
        return Record(str(identifier), text, line)


def bounded_lines(stream: Any, name: str) -> Iterator[bytes]:
    """Yield the lines of an open file of bytes, each with its line end.

    Args:
        stream: What is read; of its methods `read` alone, as not every file system's files have a `readline` with a limit.
        name: For the message.

    Raises:
        InputError: If a line is longer than any row may be; the message has its number.
    """
    rest, number = b"", 0
    while block := stream.read(_BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
        number += len(lines)
        if len(rest) > ROW_BYTES:
            raise InputError(f"{name}, line {number + 1}: is longer than {ROW_BYTES >> 20} MiB, which is no row of texts; cut it.")
    if rest:
        yield rest


_BLOCK = 1 << 20


def allow_long_fields() -> None:
    """Let the csv module read fields as long as a row may be; it refuses those above 128 KiB by itself.

    Its limit is one for the whole process: put back after a file, it would be taken from another that is still being read.
    """
    csv.field_size_limit(max(csv.field_size_limit(), ROW_BYTES))


def plain_rows(batch: Any, name: str) -> list[dict[str, Any]]:
    """Return a batch of a Parquet file as Python values by column.

    Raises:
        InputError: If one has no place in Python, such as a date in the year 30,000.
    """
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        raise InputError(f"{name}: cannot be read as Parquet: {error}") from error
    return rows


def json_object(content: str, place: str) -> dict[str, Any]:
    """Return the JSON object of one line.

    Raises:
        InputError: If it is none; the message begins with `place`.
    """
    try:
        row = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: invalid JSON at character {error.colno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: JSON that cannot be read: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f'{place}: expected an object such as {{"text": "..."}}, got {content.strip()!r:.60}')
    return row


def is_unicode(text: str) -> bool:
    """Whether a string can be encoded: one with a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
