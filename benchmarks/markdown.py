"""Tables of the documents that are made from result files."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demoted(text: str) -> str:
    """Put every heading a level lower."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.split("\n"))
