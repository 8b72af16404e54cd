"""Evaluation sets on disk: what kind each is, and its rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from genembed.errors import ConfigurationError, DataError
from genembed.testsets import SUFFIXES, TEST, RetrievalSet, json_lines, read_retrieval_set, retrieval_files

Kind = Literal["retrieval", "sts", "pairs", "classification", "clustering"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "sts": ("sentence1", "sentence2", "score"),
    "pairs": ("sentence1", "sentence2", "label"),
    "classification": ("text", "label", "split"),
    "clustering": ("text", "label"),
}
"""Columns of each kind of file, in the order in which kinds are recognised."""
_TRAIN = "train"

Columns = dict[str, list[Any]]


@dataclass(frozen=True, eq=False)
class LocalSet:
    """One evaluation set."""

    name: str
    """Name of its file or folder; the aspect behind it, where one is chosen."""
    kind: Kind
    split: str
    """The split that is evaluated."""
    rows: Columns
    """Columns of that split; empty for retrieval."""
    train: Columns
    """Columns of the training split; empty where the kind has none."""
    retrieval: RetrievalSet | None
    fingerprint: str
    """SHA-256 of everything above but the name."""


def find_sets(path: Path) -> list[Path]:
    """List the sets in a folder: retrieval folders, and files of rows; or `path` itself, if it is one.

    Raises:
        DataError: If there is none.
    """
    if path.is_file() or _is_retrieval(path):
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder.")
    found = [each for each in sorted(path.iterdir()) if _is_retrieval(each) or (each.is_file() and each.name.endswith(SUFFIXES))]
    if not found:
        raise DataError(
            f"{path}: holds no evaluation set; a set is a folder with corpus.jsonl, queries.jsonl and qrels, or a .jsonl[.gz] file of rows."
        )
    return found


def read_set(path: Path, *, kind: Kind | None = None, split: str | None = None, aspect: str | None = None) -> LocalSet:
    """Read a set.

    Args:
        path: A retrieval folder in BEIR's layout, or a `.jsonl[.gz]` file of rows.
        kind: What it is; recognised from the columns if None.
        split: The split to evaluate; `test` if None, and all rows of a clustering.
        aspect: The column that holds the labels of a clustering, where it is not `label`.

    Raises:
        DataError: If it cannot be read as that; with file and line.
    """
    if path.is_dir():
        if kind not in (None, "retrieval") or aspect is not None:
            raise DataError(f"{path}: is a folder, so it is read as a retrieval set, not as {kind or 'clustering'}; name a .jsonl file.")
        return _retrieval(path, split or TEST)
    if kind == "retrieval":
        raise DataError(f"{path}: is a file; a retrieval set is a folder with corpus.jsonl, queries.jsonl and qrels.")
    rows = list(json_lines(path))
    if not rows:
        raise DataError(f"{path}: is empty; a set has at least one row.")
    found: Kind = kind or ("clustering" if aspect is not None else _recognise(path, rows[0][1].keys(), rows))
    return _tabular(path, rows, found, split, aspect or "label")


def _name(path: Path) -> str:
    return next((path.name.removesuffix(suffix) for suffix in reversed(SUFFIXES) if path.name.endswith(suffix)), path.name)


def _is_retrieval(path: Path) -> bool:
    return path.is_dir() and any((path / f"corpus{suffix}").is_file() for suffix in SUFFIXES)


def _retrieval(folder: Path, split: str) -> LocalSet:
    data = read_retrieval_set(*retrieval_files(folder, split=split))
    content = {"documents": data.fingerprint, "queries": data.queries, "relevant": data.relevant}
    return LocalSet(folder.resolve().name, "retrieval", split, {}, {}, data, _hash(content))


def _recognise(path: Path, columns: Iterable[str], rows: Sequence[tuple[int, dict[str, Any]]]) -> Kind:
    """Tell the kind from the columns: the first of the kinds whose columns are all there."""
    columns = list(columns)
    for kind, needed in _COLUMNS.items():
        if set(needed) <= set(columns):
            if kind == "classification" and _TRAIN not in {row.get("split") for _, row in rows}:
                break
            return kind
    raise DataError(
        f"{path}: the columns {', '.join(columns)} are those of no kind of set ("
        + "; ".join(f"{kind}: {', '.join(needed)}" for kind, needed in _COLUMNS.items())
        + ", classification with rows of the split train); name the kind with --kind."
    )


def _tabular(path: Path, rows: Sequence[tuple[int, dict[str, Any]]], kind: Kind, split: str | None, label: str) -> LocalSet:
    needed = ["sentence1", "sentence2"] if kind in ("sts", "pairs") else ["text"]
    target = "score" if kind == "sts" else label
    checked = [_checked(path, line, row, [*needed, target], kind) for line, row in rows]
    splits = [row.get("split") for _, row in rows]
    everything = split is None and (kind == "clustering" or set(splits) == {None})
    wanted = "all" if everything else split or TEST
    columns = partial(_columns, names=[*needed, target], target=target, kind=kind)
    chosen = columns([row for row, own in zip(checked, splits, strict=True) if everything or own == wanted])
    if not chosen[needed[0]]:
        known = ", ".join(sorted({str(own) for own in splits if own is not None})) or "none"
        raise DataError(f"{path}: no row has the split {wanted!r} (splits: {known}); choose another one with --split.")
    train: Columns = {}
    if kind == "classification":
        train = columns([row for row, own in zip(checked, splits, strict=True) if own == _TRAIN])
        _check_classes(path, wanted, train, chosen)
    name = _name(path) if label == "label" else f"{_name(path)} ({label})"
    return LocalSet(name, kind, wanted, chosen, train, None, _hash({"kind": kind, "split": wanted, "rows": chosen, "train": train}))


def _checked(path: Path, line: int, row: dict[str, Any], names: Sequence[str], kind: Kind) -> dict[str, Any]:
    """Return a row if its texts are texts and its target is what the kind needs."""
    for name in names[:-1]:
        if not isinstance(row.get(name), str):
            raise DataError(f"{path}, line {line}: {kind} needs a string as {name}, not {json.dumps(row.get(name))[:80]}.")
    target = row.get(names[-1])
    number = isinstance(target, (int, float)) and not isinstance(target, bool)
    right = {
        "sts": number and target == target,  # not NaN
        "pairs": number and target in (0, 1),
    }.get(kind, isinstance(target, (str, int)))
    if not right:
        wanted = {"sts": "a number", "pairs": "0 or 1"}.get(kind, "a string or a whole number")
        raise DataError(f"{path}, line {line}: {kind} needs {wanted} as {names[-1]}, not {json.dumps(target)[:80]}.")
    return row


def _columns(rows: Sequence[dict[str, Any]], *, names: Sequence[str], target: str, kind: Kind) -> Columns:
    """Turn rows into columns; the target is always called `label`, or `score`."""
    return {(name if name != target or kind == "sts" else "label"): [row[name] for row in rows] for name in names}


def _check_classes(path: Path, split: str, train: Columns, rows: Columns) -> None:
    if split == _TRAIN:
        raise DataError(f"{path}: the split {_TRAIN} is what the classifier is fitted on; evaluate another one with --split.")
    if not train["text"]:
        raise DataError(f"{path}: classification needs rows of the split {_TRAIN}, on which the classifier is fitted, and there are none.")
    if len(set(train["label"])) < 2:
        raise DataError(f"{path}: all rows of the split {_TRAIN} have the label {train['label'][0]!r}; a classifier needs two.")
    strangers = sorted({str(label) for label in rows["label"]} - {str(label) for label in train["label"]})
    if strangers:
        raise DataError(f"{path}: the label {strangers[0]!r} of the split {split} does not occur in the split {_TRAIN}.")


def parse_aspects(values: Sequence[str]) -> dict[str, str]:
    """Read instructions by label column, from COLUMN=INSTRUCTION.

    Raises:
        ConfigurationError: If one is not of that form, is there twice, or stands alone.
    """
    aspects: dict[str, str] = {}
    for value in values:
        column, _, instruction = value.partition("=")
        if not column.strip() or not instruction.strip():
            raise ConfigurationError(f'--aspect {value}: write COLUMN="instruction", as label="Represent the topic of this text."')
        if column.strip() in aspects:
            raise ConfigurationError(f"--aspect {column.strip()} is given twice; an aspect has one instruction.")
        aspects[column.strip()] = instruction.strip()
    if len(aspects) == 1:
        raise ConfigurationError(f"--aspect {values[0]}: one aspect is an ordinary clustering; give two or more.")
    return aspects


def _hash(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
