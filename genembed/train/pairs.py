"""Training pairs out of data files: the layouts that are known, and what becomes of a row that cannot be used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from genembed.errors import ConfigurationError, DataError
from genembed.records import is_unicode
from genembed.train.sources import HUB, SUFFIXES, RowError, read_rows

_EXAMPLES = 10
"""Left-out rows that are named one by one; the rest is only counted."""

_SYMMETRIC = {
    "symmetric_sts": True,
    "symmetric_clustering": True,
    "symmetric_class": False,  # the positive is the description of a class
    "asymmetric": False,
    "normal": False,
    "only_1neg": False,
}
"""Values of a row's `type`, in BGE's words: whether positives and negatives are of the same kind as the query."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A query, the texts that belong to it, and texts that do not."""

    query: str
    positives: tuple[str, ...]
    """At least one; of a scored pair the one text that was compared."""
    negatives: tuple[str, ...]
    instruction: str | None
    """What a model is told to do with the query."""
    source: str
    """Name of the `DataFile`."""
    symmetric: bool
    """Positives and negatives are of the same kind as the query, so they take its instruction too."""
    score: float | None
    """Likeness of query and positive, 0..1; None where a positive is simply a positive."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One source of training pairs."""

    path: str
    """A `.jsonl`, `.jsonl.gz` or `.parquet` file, a folder written by `save_to_disk`, or `hf:NAME[:SPLIT]` for a data set of the hub,
    which is streamed."""
    weight: int | float = 1
    """Relative share in the mix, whatever the length of the file: at weight 2 it is drawn twice as often as a file at weight 1."""
    name: str | None = None
    """What the source is called in pairs and reports; None for the last part of the path, without file type."""
    instruction: str | None = None
    """Instruction of every query; None for the rows' own `prompt`."""
    symmetric: bool | None = None
    """Whether positives and negatives are of the same kind as the query; None for the row's `type`, and without one as its layout says."""
    max_score: int | float | None = None
    """The score that means 'the same', where scores run from 0 to it; None where they run from 0 to 1."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not _is_text(self.path):
            raise ConfigurationError(f"path={self.path!r}: the path of a file is needed, as a string.")
        for option in ("name", "instruction"):
            if getattr(self, option) is not None and not _is_text(getattr(self, option)):
                raise ConfigurationError(f"{option}={getattr(self, option)!r}: it would say nothing; give a text, or leave it out.")
        if not _is_positive(self.weight):
            raise ConfigurationError(f"weight={self.weight!r}: a number above 0 is needed; leave the file out if it is to have no share.")
        if self.max_score is not None and not _is_positive(self.max_score):
            raise ConfigurationError(f"max_score={self.max_score!r}: a number above 0 is needed, for example 5 for STS Benchmark.")
        if self.symmetric is not None and not isinstance(self.symmetric, bool):
            raise ConfigurationError(f"symmetric={self.symmetric!r}: True, False, or None for what the rows say.")

    @property
    def source(self) -> str:
        """Name of the source in pairs and reports."""
        if self.name is not None:
            return self.name
        if self.path.startswith(HUB):
            return self.path.removeprefix(HUB)
        last = PurePath(self.path).name
        return next((last.removesuffix(suffix) for suffix in SUFFIXES if last.endswith(suffix)), last)


class FirstReading:
    """Tells what is met for the first time from what a later reading of a file meets again, in memory that does not grow."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def __call__(self, reading: str, line: int) -> bool:
        """Whether neither this line nor any after it has been asked about before."""
        if line <= self._last.get(reading, 0):
            return False
        self._last[reading] = line
        return True


@dataclass
class BadRows:
    """What was left out of data files because it cannot be used, counted once however often a file is read."""

    rows: Counter[str] = field(default_factory=Counter, init=False)
    """Rows left out, by reason."""
    texts: Counter[str] = field(default_factory=Counter, init=False)
    """Positives and negatives taken out of rows that stayed, by reason."""
    examples: list[str] = field(default_factory=list, init=False)
    """The first rows left out, each as `file:line: reason`."""
    _first_reading: FirstReading = field(default_factory=FirstReading, init=False, repr=False)

    @property
    def total(self) -> int:
        """Number of rows left out."""
        return self.rows.total()

    def add_row(self, path: str, line: int, error: RowError) -> None:
        """Count a row that is left out."""
        if self._first_reading(path, line):
            self.rows[error.reason] += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append(f"{path}:{line}: {error}")

    def add_texts(self, path: str, line: int, texts: Counter[str]) -> None:
        """Count texts that were taken out of a row."""
        if texts and self._first_reading(path, line):
            self.texts.update(texts)

    def report(self) -> str:
        """Say what was left out: the reasons on the first line, then the first rows, one on each line."""
        rows, texts = (
            f" ({', '.join(f'{reason}: {count}' for reason, count in counts.most_common())})" if counts else ""
            for counts in (self.rows, self.texts)
        )
        summary = f"{self.total} rows left out{rows}, {self.texts.total()} texts taken out of others{texts}"
        return "\n  ".join([summary, *self.examples])


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Which columns hold what."""

    query: str
    positive: str
    negative: str | None = None
    """Column of the negatives; more of them may be in columns of this name with `_1`, `_2` and so on."""
    score: str | None = None
    symmetric: bool = False
    """What holds for a row without a `type`."""

    def fits(self, columns: Sequence[str]) -> bool:
        return {self.query, self.positive, *([self.score] if self.score else [])} <= set(columns)

    def reads(self, column: str) -> bool:
        return column in (self.query, self.positive, self.score, "prompt", "type") or self.is_negative(column)

    def is_negative(self, column: str) -> bool:
        if self.negative is None:
            return False
        number = column.removeprefix(f"{self.negative}_")
        return column == self.negative or (number != column and number.isdecimal())

    def __str__(self) -> str:
        optional = f"[, {self.negative}]" if self.negative else ""
        return f"{{{', '.join(filter(None, (self.query, self.positive, self.score)))}{optional}}}"


_LAYOUTS = (
    _Layout(query="query", positive="pos", negative="neg"),
    _Layout(query="anchor", positive="positive", negative="negative"),
    _Layout(query="sentence1", positive="sentence2", score="score", symmetric=True),
    _Layout(query="sentence1", positive="sentence2", score="label", symmetric=True),
    _Layout(query="sentence1", positive="sentence2", symmetric=True),
)
"""The first that fits is taken, so the scored ones stand before the one without a score."""


def read_pairs(file: DataFile, bad: BadRows, *, strict: bool = False) -> Iterator[tuple[int, Pair]]:
    """Read the pairs of a file, each with its line (in a table: its row, from 1); the file is never held as a whole.

    The first row says by its columns what layout the file has: {query, pos, neg} as BGE and E5 write it, {anchor, positive, negative} or
    {.., negative_1, negative_2, ..} as Sentence Transformers does, {sentence1, sentence2}, or the same with a score or a label of 0 or
    1, which is taken as score. A text may stand alone or in a list; negatives may be missing; `prompt` and `type` are read in any layout.

    A row that cannot be used is left out and counted in `bad`; so is a positive that equals its query, and a negative that equals its query
    or a positive, but for case and white space.

    Args:
        file: What to read.
        bad: Counts what is left out.
        strict: Stop at the first row that cannot be used.

    Raises:
        ConfigurationError: If there is no such file, or `max_score` is set for rows that have no score.
        DataError: If the layout is unknown, the file as a whole is broken, or in strict mode a row cannot be used.
        MissingExtraError: If the library that reads the file is not installed.
    """
    layout: _Layout | None = None
    for line, row in _rows(file):
        try:
            if isinstance(row, RowError):
                raise row
            layout = layout or _layout_of(list(row), file, line)
            pair, removed = _pair(row, layout, file)
        except RowError as error:
            if strict:
                raise DataError(f"{file.path}:{line}: {error}. Mend or drop the row, or pass over such rows with strict=False.") from error
            bad.add_row(file.path, line, error)
        else:
            bad.add_texts(file.path, line, removed)
            yield line, pair


def is_scored(file: DataFile) -> bool:
    """Whether the pairs of a file have scores, as its first row tells.

    Raises:
        ConfigurationError: If there is no such file, or `max_score` is set for rows that have no score.
        DataError: If the layout is unknown, or the file has no rows.
    """
    for line, row in _rows(file):
        if not isinstance(row, RowError):
            return _layout_of(list(row), file, line).score is not None
    raise DataError(f"{file.path}: has no rows.")


def folded(text: str) -> str:
    """Return a text without regard to case and to the kind and amount of white space."""
    return " ".join(text.split()).casefold()


def _rows(file: DataFile) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    def select(columns: Sequence[str]) -> list[str]:
        layout = _layout_of(columns, file, line=None)
        return [column for column in columns if layout.reads(column)]

    return read_rows(file.path, select)


def _layout_of(columns: Sequence[str], file: DataFile, line: int | None) -> _Layout:
    layout = next((known for known in _LAYOUTS if known.fits(columns)), None)
    if layout is None:
        place = file.path if line is None else f"{file.path}:{line}"
        known = "; ".join(map(str, _LAYOUTS))
        raise DataError(
            f"{place}: unknown layout with the columns {', '.join(columns) or '(none)'}; known are {known}. Rename the columns."
        )
    if file.max_score is not None and layout.score != "score":
        raise ConfigurationError(f"{file.path}: max_score={file.max_score!r} has no effect on rows {layout}; leave it out.")
    return layout


def _pair(row: Mapping[str, Any], layout: _Layout, file: DataFile) -> tuple[Pair, Counter[str]]:
    """Make a pair of a row, and count the texts that were taken out of it."""
    query, *others = _required(row, layout.query, "no query")
    positives = _required(row, layout.positive, "no positive")
    if others or (layout.score and len(positives) > 1):
        raise RowError("wrong type", f"{layout}: several texts where one is needed")
    negatives = [text for column in row if layout.is_negative(column) for text in _texts(row, column)]
    own = folded(query)
    other_positives = [text for text in positives if folded(text) != own]
    if not other_positives:
        raise RowError("positive equals the query", f"{query!r:.60}")
    taken = {own, *map(folded, other_positives)}
    other_negatives = [text for text in negatives if folded(text) not in taken]
    removed = {
        "positive equals the query": len(positives) - len(other_positives),
        "negative equals the query or a positive": len(negatives) - len(other_negatives),
    }
    pair = Pair(
        query=query,
        positives=tuple(other_positives),
        negatives=tuple(other_negatives),
        instruction=_instruction(row) if file.instruction is None else file.instruction,
        source=file.source,
        symmetric=_symmetric(row, layout) if file.symmetric is None else file.symmetric,
        score=_score(row, layout, file),
    )
    return pair, Counter({reason: count for reason, count in removed.items() if count})


def _required(row: Mapping[str, Any], column: str, reason: str) -> list[str]:
    texts = _texts(row, column)
    if not texts:
        raise RowError(reason)
    return texts


def _texts(row: Mapping[str, Any], column: str) -> list[str]:
    value = row.get(column)
    texts = [] if value is None else value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise RowError("wrong type", f"column {column!r} holds {text!r:.60}")
        if not text.strip():
            raise RowError("empty text", f"column {column!r}")
        if not is_unicode(text):
            raise RowError("lone surrogate", f"column {column!r} holds {text!r:.60}")
    return texts


def _instruction(row: Mapping[str, Any]) -> str | None:
    if row.get("prompt") == "":
        return None
    prompts = _texts(row, "prompt")
    if len(prompts) > 1:
        raise RowError("wrong type", "column 'prompt' holds several texts")
    return prompts[0] if prompts else None


def _symmetric(row: Mapping[str, Any], layout: _Layout) -> bool:
    kind = row.get("type")
    if kind is None:
        return layout.symmetric
    if not isinstance(kind, str) or kind not in _SYMMETRIC:
        raise RowError(
            "unknown type", f"{kind!r:.60}; known are {', '.join(_SYMMETRIC)}; otherwise say symmetric=True or False for the file"
        )
    return _SYMMETRIC[kind]


def _score(row: Mapping[str, Any], layout: _Layout, file: DataFile) -> float | None:
    if layout.score is None:
        # Left unread, a score of 0 would turn two unlike sentences into a positive pair.
        if any(known.score in row for known in _LAYOUTS if known.score and known.query == layout.query):
            raise RowError("unexpected score", "the first row of the file has none")
        return None
    value = row.get(layout.score)
    if value is None or value != value:
        raise RowError("no score", f"column {layout.score!r} holds {value!r}")
    if layout.score == "label":
        if value not in (0, 1):
            raise RowError("wrong label", f"{value!r:.60} is neither 0 nor 1; name the column score if it is one")
        return float(value)
    if not _is_number(value):
        raise RowError("wrong type", f"column 'score' holds {value!r:.60}")
    highest = 1.0 if file.max_score is None else file.max_score
    if not 0 <= value <= highest:
        raise RowError("score out of range", f"{value!r:.60} is not in 0..{highest:g}; say with max_score which score means 'the same'")
    return float(value) / highest


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and bool(0 < value < math.inf)
