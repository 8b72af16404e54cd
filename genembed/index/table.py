"""The LanceDB table of an index: its columns, its versions, and the queries it answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float, Int, Shaped

from genembed.errors import ConfigurationError, InputError, missing_extra
from genembed.index.description import DESCRIPTION_FILE, damaged
from genembed.index.metadata import OWN_COLUMNS
from genembed.index.passages import Passage
from genembed.index.stored import Stored, nearest_codes

try:
    import lancedb
    import pyarrow
    from lancedb.index import FTS
    from lancedb.rerankers import RRFReranker
except ModuleNotFoundError as missing:
    raise missing_extra("index", missing.name or "lancedb") from missing

_NAME = "passages"
_LOCK = "changing.lock"
_FUSED = 100
"""Texts that either list of a hybrid search brings, at least: reciprocal ranks below are too small to change the first ten."""
_REFINED = 10
"""An approximate search looks for so many times more neighbours by their quantised vectors and ranks them by the true ones. Without it
the distances are not even cosine ones: LanceDB 0.40 returns those of scalar-quantised vectors twice as large."""

_PLACE = re.compile(r", /\S+\.rs:\d+:\d+")
"""Where in its source LanceDB found a fault, which helps nobody who wrote a filter."""


@dataclass(frozen=True)
class Hit:
    """A text that was found."""

    score: float
    """Cosine with the query; in a lexical search its BM25 score, in a hybrid one the sum of its reciprocal ranks."""
    reference: str
    summary: str
    text: str
    path: str = ""
    """File it was read from; empty if it is from none, or the index is of before files were noted."""
    kind: str = ""
    """What the file is, such as `md`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Columns that were kept beside the text."""


def create_table(folder: Path, data: Any) -> Any:
    """Create the table of an index, with the full-text index of its texts."""
    table = lancedb.connect(str(folder)).create_table(_NAME, data=data)
    table.create_index("text", config=FTS())
    return table


def open_table(folder: Path, version: int | None) -> Any:
    """Open the table as it was at a version; what a killed update wrote after it is not seen."""
    table = lancedb.connect(str(folder)).open_table(_NAME)
    if version is not None and version != table.version:
        table.checkout(version)
    return table


def writable_table(folder: Path, version: int | None) -> Any:
    """Open the table for changes, after what a killed update wrote has been taken back."""
    table = open_table(folder, version)
    if version is not None and version != lancedb.connect(str(folder)).open_table(_NAME).version:
        table.restore()
    return table


def arrow_table(
    passages: Sequence[Passage],
    vectors: Shaped[np.ndarray, "texts codes"],
    steps: Int[np.ndarray, "texts"],
    truncated: Bool[np.ndarray, "texts"],
    *,
    types: Mapping[str, Any] | None = None,
) -> Any:
    """Return passages and what was made of them as rows of the table.

    Args:
        passages: The texts.
        vectors: Their embeddings, in the form the index keeps them in.
        steps: Refinement steps done for each.
        truncated: Which of them lost their end.
        types: Types of the columns of metadata, if they are decided; otherwise they are what the values are.

    Raises:
        ConfigurationError: If a passage has a column that the table has not.
        InputError: If the values of a column are not of one type.
    """
    columns: dict[str, Any] = {
        name: pyarrow.array([getattr(passage, name) for passage in passages], type=pyarrow.string())
        for name in ("reference", "summary", "text", "path", "kind", "content_hash")
    }
    flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
    columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    columns["steps"] = pyarrow.array(steps, type=pyarrow.int32())
    columns["truncated"] = pyarrow.array(truncated)
    names = list(dict.fromkeys(name for passage in passages for name in passage.metadata))
    if types is not None and (strangers := set(names) - set(types)):
        raise ConfigurationError(
            f"the index has no column {', '.join(sorted(strangers))}; it keeps those it was built with ({', '.join(types) or 'none'}): "
            "leave it out, or build the index again with --overwrite."
        )
    for name in names if types is None else types:
        columns[name] = _column(name, [passage.metadata.get(name) for passage in passages], None if types is None else types[name])
    return pyarrow.table(columns)


def _column(name: str, values: Sequence[Any], known: Any) -> Any:
    try:
        column = pyarrow.array(values, type=known)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise InputError(
            f"column {name!r} of the metadata does not hold values of one type ({known or 'the first one'}): {error}"
        ) from None
    return column.cast(pyarrow.string()) if pyarrow.types.is_null(column.type) else column


def metadata_types(table: Any) -> dict[str, Any]:
    """Return the columns that were kept beside the texts, with their types."""
    return {column.name: column.type for column in table.schema if column.name not in OWN_COLUMNS}


def read_columns(table: Any, names: Sequence[str]) -> Any:
    """Return columns of all rows, with their row ids as `_rowid`."""
    return table.search().select(list(names)).with_row_id(True).limit(None).to_arrow()


def nearest(
    table: Any,
    vector: Float[np.ndarray, "hidden"],
    k: int,
    *,
    where: str | None,
    approximate: bool,
    columns: Sequence[str],
    stored: Stored,
) -> Any:
    """Return the rows whose vectors have the highest cosine with a query's, best first, with `_distance` and `_rowid`."""
    if stored.coded:
        return nearest_codes(table, stored, vector, k, where=where, columns=columns)
    query = table.search(stored.query(vector)).distance_type("cosine").limit(k).select([*columns, "_distance"]).with_row_id(True)
    query = query.refine_factor(_REFINED) if approximate else query.bypass_vector_index()
    return (query if where is None else query.where(where)).to_arrow()


def lexical(table: Any, text: str, k: int, *, where: str | None, columns: Sequence[str]) -> Any:
    """Return the rows whose texts have the highest BM25 score for the words of a query, best first, with `_score` and `_rowid`."""
    query = table.search(text, query_type="fts", fts_columns="text").limit(k).select([*columns, "_score"]).with_row_id(True)
    return (query if where is None else query.where(where)).to_arrow()


def hybrid(
    table: Any,
    vector: Float[np.ndarray, "hidden"],
    text: str,
    k: int,
    *,
    where: str | None,
    approximate: bool,
    columns: Sequence[str],
    stored: Stored,
) -> Any:
    """Return the rows that come first when the lists by cosine and by BM25 are joined, with `_relevance_score` and `_rowid`.

    score = sum over the lists of 1 / (60 + rank)        (Cormack and others 2009, reciprocal rank fusion)
    """
    wide = max(k, _FUSED)
    by_vector = nearest(table, vector, wide, where=where, approximate=approximate, columns=columns, stored=stored)
    by_words = lexical(table, text, wide, where=where, columns=columns)
    return RRFReranker().rerank_hybrid(text, by_vector, by_words).slice(0, k)


@contextmanager
def answering(folder: Path, where: str | None) -> Iterator[None]:
    """Turn LanceDB's errors into ours: a filter that does not work is the user's, anything else is damage.

    Raises:
        ConfigurationError: If there is a filter and it is at fault.
        CheckpointError: If files are missing or unreadable.
    """
    try:
        yield
    except ValueError as error:
        if where is None:
            raise damaged(folder, error) from error
        raise bad_filter(where, error) from error
    except (OSError, RuntimeError) as error:
        raise damaged(folder, error) from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from changing or replacing an index; one that is killed does not. Where there is none, nothing is done.

    The lock lies in the folder, which may be all that can be written. It is held until a folder that is replaced has been deleted, and
    the lock with it; whoever opened the index before finds another description then.

    Raises:
        ConfigurationError: If another one is changing it, or it cannot be written.
    """
    if not (folder / DESCRIPTION_FILE).is_file():
        yield
        return
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigurationError(f"{folder}: somebody else is changing the index; nothing was done, do it again later.") from None
    except OSError as error:
        raise ConfigurationError(f"{folder}: cannot be changed, and is as it was: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Say that a change of the table that did not work has changed nothing.

    Raises:
        ConfigurationError: With LanceDB's reason.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(f"{folder}: cannot be changed, and is as it was: {_PLACE.sub('', str(error))}") from error


def bad_filter(where: str, error: ValueError) -> ConfigurationError:
    """Return the error of a filter that LanceDB refuses."""
    reason = _PLACE.sub("", str(error)).removeprefix("Invalid input, ").rstrip(".")
    return ConfigurationError(
        f"filter {where!r}: {reason}; write it as a condition of SQL over the index's columns, for example: "
        "kind = 'md' AND path LIKE 'notes/%'"
    )
