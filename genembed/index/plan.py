"""What an update has to do: which texts are new, which have only moved, which are gone."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genembed.files import STANDARD_STREAM
from genembed.index.passages import STDIN, Passage

SHOWN_COLUMNS = ("content_hash", "path", "reference", "summary", "kind")
"""What tells one row from another, beside its metadata."""


@dataclass(frozen=True)
class Plan:
    """What has to be done to the rows of an index so that it holds some passages; passages by position, rows by row id."""

    embed: list[int] = field(default_factory=list)
    """Passages whose text the index does not have."""
    moved: dict[int, int] = field(default_factory=dict)
    """Passages that stood at another place of their file, or had other metadata; and their row, which goes."""
    copied: dict[int, int] = field(default_factory=dict)
    """Passages whose text the index has from elsewhere; and a row that has its vector."""
    gone: list[int] = field(default_factory=list)
    """Rows that their source no longer has."""
    kept: list[int] = field(default_factory=list)
    """Rows that would be gone, but whose file or folder could not be read, which is no sign of that."""

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.embed or self.moved or self.copied or self.gone)


def plan_update(
    stored: Mapping[str, Sequence[Any]],
    passages: Sequence[Passage],
    *,
    metadata: Sequence[str],
    prune: Iterable[str],
    unread: Iterable[str] = (),
) -> Plan:
    """Compare passages with the rows of an index, by the hash of their text.

    A passage is matched with one row: first with one that is the same in everything, then with one of the same file and text,
    which has moved. A text that occurs several times is several rows. A passage without metadata leaves its row's as they are.

    Args:
        stored: Columns of the index without texts and vectors, and `_rowid`.
        passages: What the index has to hold.
        metadata: Columns of the index that were kept beside the texts.
        prune: Files and folders whose other rows are gone.
        unread: Files and folders of these whose rows are not, as nobody knows what is in them.
    """
    plan, ids = Plan(), stored["_rowid"]
    by_all, by_shown, by_place = (defaultdict[tuple[Any, ...], deque[int]](deque) for _ in range(3))
    by_text: dict[str, int] = {}
    rows = list(zip(*(stored[name] for name in (*SHOWN_COLUMNS, *metadata)), strict=True))
    for row, values in enumerate(rows):
        by_all[values].append(row)
        by_shown[values[: len(SHOWN_COLUMNS)]].append(row)
        by_place[values[:2]].append(row)
        by_text.setdefault(values[0], row)
    free, left = set(range(len(rows))), []
    for number, passage in enumerate(passages):
        shown = tuple(getattr(passage, name) for name in SHOWN_COLUMNS)
        values = (*shown, *(passage.metadata.get(name) for name in metadata))
        if _taken(by_all[values] if passage.metadata else by_shown[shown], free) is None:
            left.append((number, shown))
    for number, shown in left:
        moved = _taken(by_place[shown[:2]], free)
        if moved is not None:
            plan.moved[number] = ids[moved]
        elif shown[0] in by_text:
            plan.copied[number] = ids[by_text[shown[0]]]
        else:
            plan.embed.append(number)
    scopes, closed = [Path(path) for path in prune], {Path(path) for path in unread}
    for row in sorted(free):
        if _below(rows[row][1], scopes):
            named = Path(rows[row][1])
            (plan.gone if closed.isdisjoint([named, *named.parents]) else plan.kept).append(ids[row])
    return plan


def _taken(rows: deque[int], free: set[int]) -> int | None:
    """Take the first row that no passage has been matched with."""
    while rows:
        row = rows.popleft()
        if row in free:
            free.remove(row)
            return row
    return None


def _below(path: str, scopes: Sequence[Path]) -> bool:
    """Whether a file is one of these or lies below one of these, as they are written."""
    if path == STDIN:
        return Path(STANDARD_STREAM) in scopes
    named = Path(path)
    return bool(path) and any(named.is_relative_to(scope) and ".." not in named.relative_to(scope).parts for scope in scopes)
