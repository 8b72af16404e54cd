"""The index at scale: random unit vectors and random words on disk, built and searched without a model; times, memory, recall.

    python benchmarks/index_scale.py [--rows 100000] [--dimensions 384] [--queries 100] [--out FOLDER]

Random vectors in many dimensions have no near neighbours, which is the hardest case for an approximate index: recall on texts is higher.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import lancedb
import numpy as np
from results_file import RESULTS, machine, write

from genembed.index import Index, Passage
from genembed.settings import ModelSettings

_WORDS = 5_000
_LENGTH = 40


class RandomVectors:
    """Stands in for a model: its vectors are random, and it takes no time."""

    settings = ModelSettings()
    source = SimpleNamespace(name="random vectors", named_adapter=None, preset=None, base=None, adapter=None, head=None)

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.random = np.random.default_rng(0)

    def get_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return self.dimensions

    def refine(self, texts: Sequence[str], **_: Any) -> SimpleNamespace:
        """Return a random unit vector for each text."""
        vectors = self.random.standard_normal((len(texts), self.dimensions), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return SimpleNamespace(vectors=vectors, steps=np.zeros(len(texts), dtype=np.int64), truncated=np.zeros(len(texts), dtype=bool))


def peak_mebibytes() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def milliseconds(search: Callable[[int], object], queries: int) -> dict[str, float]:
    """Time a search of every query, after three that warm up."""
    for query in range(min(3, queries)):
        search(query)
    times = []
    for query in range(queries):
        begin = time.perf_counter()
        search(query)
        times.append(1000 * (time.perf_counter() - begin))
    return {"median_ms": round(median(times), 2), "p95_ms": round(float(np.percentile(times, 95)), 2)}


def measure(folder: Path, *, rows: int, dimensions: int, queries: int) -> dict[str, Any]:
    """Build an index without and with an approximate one, and search both."""
    random = np.random.default_rng(1)
    texts = [" ".join(f"w{word}" for word in words) for words in random.zipf(1.3, (rows, _LENGTH)) % _WORDS]
    passages = [Passage(text, str(row), text[:80], "random", "txt", {"number": row}) for row, text in enumerate(texts)]
    embedder: Any = RandomVectors(dimensions)
    vectors = embedder.refine(texts[:queries]).vectors
    values: dict[str, Any] = {"rows": rows, "dimensions": dimensions, "queries": queries, "memory_before_mib": round(peak_mebibytes())}
    begin = time.perf_counter()
    index = Index.build(folder / "index", embedder, passages)
    values["build_seconds"] = round(time.perf_counter() - begin, 2)
    values["memory_after_build_mib"] = round(peak_mebibytes())
    values["exact"] = milliseconds(lambda query: index.search(vectors[query]), queries)
    values["exact_filtered"] = milliseconds(lambda query: index.search(vectors[query], where=f"number < {rows // 10}"), queries)
    values["lexical"] = milliseconds(lambda query: index.search_lexical(texts[query][:60]), queries)
    values["hybrid"] = milliseconds(lambda query: index.search_hybrid(vectors[query], texts[query][:60]), queries)
    begin = time.perf_counter()
    index.update(embedder, [], ann=True)
    values["ann_build_seconds"] = round(time.perf_counter() - begin, 2)
    assert index.description.approximation is not None
    values["ann_recall_at_10"] = round(index.description.approximation.recall, 4)
    found = [[set(index.nearest(vector, exact=exact)) for vector in vectors] for exact in (True, False)]
    values["ann_recall_at_10_new_queries"] = round(float(np.mean([len(own & near) / 10 for own, near in zip(*found, strict=True)])), 4)
    values["ann"] = milliseconds(lambda query: index.search(vectors[query]), queries)
    begin = time.perf_counter()
    index.update(embedder, passages[:10] + [Passage(f"new {row}", f"new {row}", "new", "random", "txt") for row in range(100)])
    values["update_100_new_seconds"] = round(time.perf_counter() - begin, 2)
    values["disk_mib"] = round(sum(path.stat().st_size for path in index.folder.rglob("*") if path.is_file()) / 2**20, 1)
    values["peak_memory_mib"] = round(peak_mebibytes())
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    print(json.dumps(machine(), indent=1))
    with tempfile.TemporaryDirectory() as folder:
        values = measure(Path(folder), rows=arguments.rows, dimensions=arguments.dimensions, queries=arguments.queries)
    values["lancedb"] = lancedb.__version__
    for name, value in values.items():
        print(f"{name:<24} {value}")
    print(write("index_scale", values, folder=arguments.out))
    print(json.dumps(values))


if __name__ == "__main__":
    main()
