"""What does an index save that keeps its vectors in a smaller form, and what does it find?

    python benchmarks/index_forms.py [--data ../shared/data] [--model mini] [--vectors FILE.npz]

SciFact's documents are embedded once, and an index is built of them in every form. All test queries are searched through the index
itself, in full precision. `recall@10`: the share of the ten documents that the float32 index finds. nDCG@10 with a 95 % bootstrap interval
of the difference to float32, paired by query. Sizes are those of the folder: texts and full-text index are in it in any form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_data import DATA, Retrieval, ndcg_at_10, retrieval
from markdown import table
from output_forms import embed
from results_file import RESULTS, machine, write
from scifact import interval

import genembed
from genembed.index import Index, Passage
from genembed.index.known import KnownVectors
from genembed.index.stored import StoredPrecision

FORMS: tuple[StoredPrecision, ...] = ("float32", "float16", "int8", "binary")
HITS = 10


def vectors_of(model: genembed.Embedder, data: Retrieval, kept: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of queries and documents; from a file, if there is one."""
    if kept is not None and kept.is_file():
        with np.load(kept) as file:
            return file["queries"], file["documents"]
    queries, documents = embed(model, data)
    if kept is not None:
        np.savez(kept, queries=queries, documents=documents)
    return queries, documents


def searched(index: Index, queries: np.ndarray, places: dict[str, int]) -> tuple[np.ndarray, np.ndarray, float]:
    """Return for each query its hits and their scores among all documents, and the median milliseconds of a search."""
    found = np.empty((len(queries), HITS), dtype=np.int64)
    scores = np.full((len(queries), len(places)), -1.0, dtype=np.float32)
    seconds = []
    for row, query in enumerate(queries):
        begin = time.perf_counter()
        hits = index.search(query, k=HITS)
        seconds.append(time.perf_counter() - begin)
        found[row] = [places[hit.reference] for hit in hits]
        scores[row, found[row]] = [hit.score for hit in hits]
    return found, scores, 1000 * statistics.median(seconds)


def size(folder: Path, part: str = "*") -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob(part) if path.is_file())


def measure(model: genembed.Embedder, data: Retrieval, queries: np.ndarray, documents: np.ndarray) -> list[dict[str, Any]]:
    """Build an index in every form, and search it."""
    texts, names = list(data.documents.values()), list(data.documents)
    nothing = np.zeros(len(texts), dtype=np.int64)
    known = KnownVectors(model.source, texts, documents, nothing, nothing.astype(bool))
    passages = [Passage(text, name, "") for name, text in zip(names, texts, strict=True)]
    places = {name: place for place, name in enumerate(names)}
    rows: list[dict[str, Any]] = []
    exact = (np.empty((0, HITS), dtype=np.int64), np.empty(0))
    with tempfile.TemporaryDirectory() as temporary:
        for precision in FORMS:
            form = model.form(precision)
            index = Index.build(Path(temporary) / precision, known, passages, form=form)
            found, scores, milliseconds = searched(index, queries, places)
            ndcg = ndcg_at_10(scores, data)
            exact = exact if rows else (found, ndcg)
            shared = [len(set(own) & set(best)) / HITS for own, best in zip(found.tolist(), exact[0].tolist(), strict=True)]
            rows.append(
                {
                    "form": precision,
                    "bytes_vector": form.bytes_per_vector,
                    "bytes_folder": size(index.folder),
                    "ndcg@10": float(ndcg.mean()),
                    "difference_95": list(interval(ndcg, exact[1])),
                    "recall@10": float(np.mean(shared)),
                    "milliseconds": milliseconds,
                }
            )
    return rows


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--vectors", type=Path, help="file the vectors are kept in, and read from if it is there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = arguments.data / "retrieval" / "scifact"
    if not folder.is_dir():
        parser.exit(2, f"{folder} is not there: this needs SciFact in BEIR's layout (corpus.jsonl, queries.jsonl, qrels.tsv); see --data\n")
    data, model = retrieval(folder), genembed.load(arguments.model)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    queries, documents = vectors_of(model, data, arguments.vectors)
    rows = measure(model, data, queries, documents)
    shown = [
        [
            row["form"],
            str(row["bytes_vector"]),
            f"{row['bytes_folder'] / 1e6:.1f}",
            f"{row['ndcg@10']:.2f}",
            "{:+.2f} to {:+.2f}".format(*row["difference_95"]),
            f"{100 * row['recall@10']:.1f}",
            f"{row['milliseconds']:.1f}",
        ]
        for row in rows
    ]
    print(table(["kept in", "bytes a vector", "folder, MB", "nDCG@10", "to float32", "recall@10, %", "ms a search"], shown))
    values = {
        "model": arguments.model,
        "halt": repr(model.settings.halt),
        "documents": len(documents),
        "queries": len(queries),
        "rows": rows,
    }
    print("written:", write("index-forms", values, folder=arguments.output))
    print(json.dumps({row["form"]: round(row["ndcg@10"], 2) for row in rows}))


if __name__ == "__main__":
    main()
