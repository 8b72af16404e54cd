"""The approximate index of an index's vectors, and how much of an exact search it finds."""

from __future__ import annotations

from typing import Any

import numpy as np

from genembed.errors import ConfigurationError, missing_extra
from genembed.index.description import Approximation
from genembed.index.table import nearest

try:
    from lancedb.index import HnswSq
except ModuleNotFoundError as missing:
    raise missing_extra("index", missing.name or "lancedb") from missing

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
    """Compare the approximate index with the exact search, for vectors evenly spread over the table."""
    rows = table.count_rows()
    chosen = sorted({place * rows // _QUERIES for place in range(_QUERIES)})
    sample = table.take_offsets(chosen).select(["vector"]).with_row_id().to_arrow()
    shares = []
    for own, values in zip(sample["_rowid"].to_pylist(), sample["vector"].to_pylist(), strict=True):
        vector = np.asarray(values, dtype=np.float32)
        found, true = (_neighbours(table, vector, own, approximate=approximate) for approximate in (True, False))
        shares.append(len(found & true) / len(true) if true else 1.0)
    return Approximation(kind=_KIND, recall=float(np.mean(shares)) if shares else 1.0, neighbours=_NEIGHBOURS, queries=len(shares))


def _neighbours(table: Any, vector: np.ndarray, own: int, *, approximate: bool) -> set[int]:
    found = nearest(table, vector, _NEIGHBOURS + 1, where=None, approximate=approximate, columns=[])
    return set([row for row in found["_rowid"].to_pylist() if row != own][:_NEIGHBOURS])
