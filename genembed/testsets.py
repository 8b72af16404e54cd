"""Retrieval sets on disk, in BEIR's layout: a corpus, queries, and judgements of which documents answer which query."""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from genembed.errors import DataError, GenembedWarning

SUFFIXES = (".jsonl", ".jsonl.gz")
"""Of the files that `json_lines` reads."""

TEST = "test"
"""The split that is read where none is named."""

_SHOWN = 3
"""Examples named in a message."""


@dataclass(frozen=True, eq=False)
class RetrievalSet:
    """Documents, queries and, where they are known, the documents that answer each query."""

    documents: dict[str, str]
    """Text by id; the title first, where there is one."""
    queries: dict[str, str]
    """Text by id; with judgements, only queries that have a relevant document."""
    relevant: dict[str, dict[str, int]] | None
    """By query, the documents judged above zero with their grades; None without judgements."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all ids and texts of the documents."""
        digest = sha256()
        for identifier, text in self.documents.items():
            digest.update(json.dumps([identifier, text]).encode())
        return digest.hexdigest()


def retrieval_files(folder: Path, *, split: str = TEST, judged: bool = True) -> tuple[Path, Path, Path | None]:
    """Find corpus, queries and judgements in a folder, as `read_retrieval_set` takes them.

    Judgements are `qrels/SPLIT.tsv`, `qrels_SPLIT.tsv` or, of the test split, `qrels.tsv`.

    Args:
        folder: In BEIR's layout.
        split: Split of the judgements.
        judged: Whether judgements are needed; otherwise None stands for those that are not there.

    Raises:
        DataError: If a file is missing.
    """
    corpus, queries = (_first(folder, [f"{name}{suffix}" for suffix in SUFFIXES]) for name in ("corpus", "queries"))
    names = [f"qrels/{split}.tsv", f"qrels_{split}.tsv", *(["qrels.tsv"] if split == TEST else [])]
    there = judged or any((folder / name).is_file() for name in names)
    return corpus, queries, _first(folder, names) if there else None


def _first(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: {' or '.join(names)} is missing; a retrieval set has corpus, queries and judgements of the split.")


def read_retrieval_set(corpus: Path, queries: Path, qrels: Path | None = None) -> RetrievalSet:
    """Read a set.

    Judgements of queries or documents that are not there, and queries without a relevant document, are left out, and a warning counts
    them.

    Args:
        corpus: `.jsonl` or `.jsonl.gz`, objects with `_id`, `text` and perhaps `title`.
        queries: The same, with `_id` and `text`.
        qrels: Tab-separated, with the header of BEIR (query-id, corpus-id, score), or TREC's four columns; scores are whole numbers.

    Raises:
        DataError: If a file cannot be read as that, an id occurs twice, a score is no whole number, or nothing is left; with file and line.
    """
    documents, texts = _read_texts(corpus), _read_texts(queries)
    if qrels is None:
        return RetrievalSet(documents, texts, None)
    judged = _read_qrels(qrels)
    known = {query: {name: grade for name, grade in own.items() if name in documents} for query, own in judged.items() if query in texts}
    _warn_unknown(qrels, judged, texts, documents)
    relevant = {query: own for query in texts if (own := {name: grade for name, grade in known.get(query, {}).items() if grade > 0})}
    if not relevant:
        raise DataError(f"{qrels}: no query of {queries} has a relevant document in {corpus}; are these files of one set?")
    if len(relevant) < len(texts):
        without = [query for query in texts if query not in relevant]
        _warn(f"{queries}: {len(without)} of {len(texts)} queries have no relevant document and are left out ({_some(without)}).")
    return RetrievalSet(documents, {query: texts[query] for query in relevant}, relevant)


def _read_texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for line, row in json_lines(path):
        identifier, text = row.get("_id", row.get("id")), row.get("text")
        if not isinstance(identifier, (str, int)) or isinstance(identifier, bool) or not isinstance(text, str):
            raise DataError(f"{path}, line {line}: an object with _id and text is needed, not {json.dumps(row)[:80]}.")
        if str(identifier) in texts:
            raise DataError(f"{path}, line {line}: the id {identifier!r} occurs a second time; ids must be unique.")
        texts[str(identifier)] = f"{row.get('title') or ''} {text}".strip()
    if not texts:
        raise DataError(f"{path}: is empty; a set has at least one text.")
    return texts


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a `.jsonl` or `.jsonl.gz` file with their lines, from 1; empty lines are passed over.

    Raises:
        DataError: If the file cannot be read, or a line is no object.
    """
    for line, text in _lines(path):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits are no JSONDecodeError
            raise DataError(f"{path}, line {line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: an object is needed, not {text.strip()[:80]}.")
        yield line, row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file:
            yield from ((number, text) for number, text in enumerate(file, start=1) if text.strip())
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    for line, text in _lines(path):
        fields = text.split("\t") if "\t" in text else text.split()
        if line == 1 and _number(fields[-1]) is None:
            continue
        if len(fields) not in (3, 4):
            raise DataError(f"{path}, line {line}: query, document and score are needed, not {text.strip()[:80]!r}.")
        query, document, grade = fields[0].strip(), fields[-2].strip(), _number(fields[-1])
        if grade is None or not grade.is_integer():
            raise DataError(f"{path}, line {line}: the score {fields[-1].strip()!r} is not a whole number, as nDCG's gains are.")
        if document in judged.setdefault(query, {}):
            raise DataError(f"{path}, line {line}: query {query!r} and document {document!r} are judged a second time.")
        judged[query][document] = int(grade)
    return judged


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _warn_unknown(path: Path, judged: dict[str, dict[str, int]], queries: dict[str, str], documents: dict[str, str]) -> None:
    strangers = {
        "queries": [query for query in judged if query not in queries],
        "documents": sorted({name for own in judged.values() for name in own if name not in documents}),
    }
    for kind, names in strangers.items():
        if names:
            _warn(f"{path}: names {len(names)} {kind} that are not there ({_some(names)}); their judgements are left out.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _warn(message: str) -> None:
    warnings.warn(message, GenembedWarning, stacklevel=4)
