"""What the sub-commands print: results on stdout, bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import typer

Item = TypeVar("Item")

_WIDTH = 140
"""Of a table, in characters, where no terminal says how wide it is."""


def printable(text: str) -> str:
    """Return a text whose control characters are written out: what comes from files of others must not give orders to a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode() for letter in text)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=repr))  # a halting rule prints as it is made


def print_result(value: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result as one JSON object, or as text."""
    if as_json:
        print_json(value)
    else:
        typer.echo(text)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[str], title: str | None = None, wrap: bool = False
) -> None:
    """Print a table.

    Args:
        headings: Of the columns.
        rows: Cells, one for each heading.
        left: Headings of the columns that hold words: set left and folded where there is no room; the others are set right.
        title: Stands above the table.
        wrap: Break headings and cells of the other columns as well; for long headings.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    for heading in headings:
        words = heading in left
        table.add_column(heading, justify="left" if words else "right", no_wrap=not (words or wrap), overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH).print(table)


def with_bar(items: Iterable[Item], action: str) -> Iterator[Item]:
    """Yield the items, with a bar on stderr when they take more than a second."""
    from tqdm import tqdm

    yield from tqdm(items, desc=action, unit="text", delay=1, leave=False)
