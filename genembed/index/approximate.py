"""The approximate index of an index's vectors, and how much of an exact search it finds."""

from __future__ import annotations

from typing import Any

import numpy as np
from lancedb.index import HnswSq

from genembed.errors import ConfigurationError
from genembed.index.description import Approximation
from genembed.index.stored import Stored
from genembed.index.table import nearest

_KIND = "IVF_HNSW_SQ"
_NEIGHBOURS = 10
_QUERIES = 100


def make_approximation(table: Any) -> Approximation:
    """Make an approximate index of a table's vectors (a graph of neighbours over 8-bit vectors), and measure it.

    Raises:
        ConfigurationError: If there are no vectors.
    """
    if not table.count_rows():
        raise ConfigurationError("--ann: there are no texts, so there is nothing to search approximately; leave it out.")
    table.create_index("vector", config=HnswSq(distance_type="cosine"))
    return measured(table)


def measured(table: Any) -> Approximation:
    """Compare the approximate index with the exact search, for means of two vectors each, evenly spread over the table.

    The vectors themselves would not do: a graph finds the neighbours of its own nodes far better than those of a new query.
    """
    rows = table.count_rows()
    chosen = sorted({place * rows // _QUERIES for place in range(_QUERIES)}) if rows else []
    sample = np.asarray(table.take_offsets(chosen).select(["vector"]).to_arrow()["vector"].to_pylist() if chosen else [], dtype=np.float32)
    shares = []
    for query in (sample + np.roll(sample, 1, axis=0)) / 2:
        found, true = (_neighbours(table, query, approximate=approximate) for approximate in (True, False))
        shares.append(len(found & true) / len(true))
    return Approximation(kind=_KIND, recall=float(np.mean(shares)) if shares else 1.0, neighbours=_NEIGHBOURS, queries=len(shares))


def _neighbours(table: Any, vector: np.ndarray, *, approximate: bool) -> set[int]:
    return set(nearest(table, vector, _NEIGHBOURS, where=None, approximate=approximate, columns=[], stored=Stored())["_rowid"].to_pylist())
