"""What does a smaller form of the vectors cost in retrieval?

    python benchmarks/output_forms.py [--data ../shared/data] [--model mini]

SciFact's documents and test queries are embedded once; each form is made of those vectors. The ranges of eight bits are the model's own,
which were measured on other texts. `x` are vectors restored from their codes, `codes` the codes' own products: in int8 every dimension
has a zero and a step of its own, so these are no cosines. nDCG@10; intervals are 95 % bootstrap intervals of the difference to float32,
paired by query. Cuts that the model was not trained for are made here alone, to show what they cost.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_data import DATA, Retrieval, ndcg_at_10, retrieval
from markdown import table
from results_file import RESULTS, machine, write
from scifact import interval

import genembed
from genembed.precision import Precision, truncate

CANDIDATES = 100
"""Best documents by bits that are sorted again by eight bits."""
CUTS = (192, 96)
_PRECISIONS: tuple[Precision, ...] = ("float16", "int8", "binary")


def forms(model: genembed.Embedder, queries: np.ndarray, documents: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield name, bytes of a document, and scores of every form."""
    exact = queries @ documents.T
    yield "float32", 4 * documents.shape[1], exact
    for precision in _PRECISIONS:
        form = model.form(precision)
        codes, asked = form(documents), form(queries)
        restored = form.restore(codes)
        yield f"{precision}: float32 query, x", form.bytes_per_vector, queries @ restored.T
        yield f"{precision}: x, x", form.bytes_per_vector, form.restore(asked) @ restored.T
        if precision == "int8":
            yield "int8: codes, codes", form.bytes_per_vector, asked.astype(np.float32) @ codes.astype(np.float32).T
    yield (
        "binary, then the best 100 by int8",
        model.form("int8").bytes_per_vector + form.bytes_per_vector,
        _rescored(model, queries, documents),
    )
    for cut in CUTS:
        if cut not in model.settings.matryoshka_dims:
            yield f"cut to {cut}, not trained for it", 4 * cut, truncate(queries, cut) @ truncate(documents, cut).T


def _rescored(model: genembed.Embedder, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    bits, eight = model.form("binary"), model.form("int8")
    coarse = bits.restore(bits(queries)) @ bits.restore(bits(documents)).T
    fine = queries @ eight.restore(eight(documents)).T
    least = np.partition(coarse, -CANDIDATES, axis=1)[:, [-CANDIDATES]]
    return np.asarray(np.where(coarse >= least, fine, coarse - 2))


def embed(model: genembed.Embedder, data: Retrieval) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of queries and documents under the model's own halting rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # many abstracts are longer than 256 tokens
        return model.encode_query(list(data.queries.values())), model.encode_document(list(data.documents.values()), show_progress_bar=True)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = arguments.data / "retrieval" / "scifact"
    if not folder.is_dir():
        parser.exit(2, f"{folder} is not there: this needs SciFact in BEIR's layout (corpus.jsonl, queries.jsonl, qrels.tsv); see --data\n")
    data, model = retrieval(folder), genembed.load(arguments.model)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    queries, documents = embed(model, data)
    rows: list[dict[str, Any]] = []
    exact = np.empty(0)
    for name, size, scores in forms(model, queries, documents):
        ndcg = ndcg_at_10(scores, data)
        exact = ndcg if not rows else exact
        rows.append({"form": name, "bytes": size, "ndcg@10": float(ndcg.mean()), "difference_95": list(interval(ndcg, exact))})
    shown = [[row["form"], str(row["bytes"]), f"{row['ndcg@10']:.2f}", "{:+.2f} to {:+.2f}".format(*row["difference_95"])] for row in rows]
    print(table(["form", "bytes a document", "nDCG@10", "to float32"], shown))
    values = {
        "model": arguments.model,
        "halt": repr(model.settings.halt),
        "documents": len(documents),
        "queries": len(queries),
        "rows": rows,
    }
    print("written:", write("output-forms", values, folder=arguments.output))
    print(json.dumps({row["form"]: round(row["ndcg@10"], 2) for row in rows}))


if __name__ == "__main__":
    main()
