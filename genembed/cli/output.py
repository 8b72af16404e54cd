"""What the sub-commands print: results on stdout, bars on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import typer

Item = TypeVar("Item")


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=repr))  # a halting rule prints as it is made


def print_result(value: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result as one JSON object, or as text."""
    if as_json:
        print_json(value)
    else:
        typer.echo(text)


def with_bar(items: Iterable[Item], action: str) -> Iterator[Item]:
    """Yield the items, with a bar on stderr when they take more than a second."""
    from tqdm import tqdm

    yield from tqdm(items, desc=action, unit="text", delay=1, leave=False)
