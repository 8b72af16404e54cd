"""Retrieval quality on SciFact: the built-in model at K = 0, K = 20 and with its halting rule, beside BM25 and its base model.

    python benchmarks/scifact.py [--data ../shared/data] [--model mini]

5,183 documents, 300 test queries, nDCG@10. K = 0 must equal all-MiniLM-L6-v2 through sentence-transformers to 1e-5, vector by
vector. Both sides, queries and documents, are refined. Intervals are 95 % bootstrap intervals of the difference to K = 0, paired
by query.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from evaluation_data import DATA, Retrieval, ndcg_at_10, retrieval
from results_file import RESULTS, machine, write

import genembed
from genembed import FixedSteps, HaltingRule


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    label: str
    ndcg: np.ndarray
    seconds: float
    query_steps: float | None = None
    document_steps: float | None = None
    vectors: np.ndarray | None = None


def run_bm25(data: Retrieval) -> Run:
    """Score with BM25 (k1 = 0.9, b = 0.4, English stop words)."""
    start = time.perf_counter()
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize(list(data.documents.values()), stopwords="en", show_progress=False), show_progress=False)
    vocabulary = bm25s.tokenize(list(data.queries.values()), stopwords="en", show_progress=False, return_ids=False)
    scores = np.stack([index.get_scores(words) for words in vocabulary])
    return Run("BM25 (bm25s)", ndcg_at_10(scores, data), time.perf_counter() - start)


def run_sentence_transformers(data: Retrieval, folder: Path) -> Run:
    """Score the base model through sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    start = time.perf_counter()
    queries = model.encode(list(data.queries.values()), normalize_embeddings=True, show_progress_bar=False)
    documents = model.encode(list(data.documents.values()), normalize_embeddings=True, show_progress_bar=False)
    seconds = time.perf_counter() - start
    return Run("all-MiniLM-L6-v2 (sentence-transformers)", ndcg_at_10(queries @ documents.T, data), seconds, vectors=documents)


def run_genembed(model: genembed.Embedder, data: Retrieval, halt: HaltingRule) -> Run:
    """Score our model under one halting rule."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # many abstracts are longer than 256 tokens, for every model here alike
        queries = model.refine(list(data.queries.values()), halt=halt)
        documents = model.refine(list(data.documents.values()), halt=halt)
    seconds = time.perf_counter() - start
    scores = model.similarity(queries.vectors, documents.vectors)
    steps = float(queries.steps.mean()), float(documents.steps.mean())
    return Run(f"{model.source.name}, {halt}", ndcg_at_10(scores, data), seconds, *steps, vectors=documents.vectors)


def interval(values: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Return the paired 95 % bootstrap interval of a mean difference."""
    difference = values - baseline
    draws = np.random.default_rng(0).integers(0, len(difference), (10_000, len(difference)))
    low, high = np.percentile(difference[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    """Run, print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = arguments.data / "retrieval" / "scifact"
    if not folder.is_dir():
        parser.exit(2, f"{folder} is not there: this needs SciFact in BEIR's layout (corpus.jsonl, queries.jsonl, qrels.tsv); see --data\n")
    data = retrieval(folder)
    model = genembed.load(arguments.model)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"SciFact: {len(data.documents):,} documents, {len(data.queries)} test queries")
    zero = run_genembed(model, data, FixedSteps(0))
    base = run_sentence_transformers(data, model.source.base)
    rows = [as_row(run, zero) for run in (zero, base, run_bm25(data))]
    rows += [as_row(run_genembed(model, data, halt), zero) for halt in (FixedSteps(20), model.settings.halt)]
    assert base.vectors is not None
    assert zero.vectors is not None
    distance = float(np.abs(base.vectors - zero.vectors).max())
    print(f"largest difference of a document vector at K = 0 from sentence-transformers: {distance:.1e}")
    values = {"documents": len(data.documents), "queries": len(data.queries), "k0_difference": distance, "runs": rows}
    print("written:", write("scifact", values, folder=arguments.output))
    print(json.dumps({row["label"]: round(row["ndcg@10"], 2) for row in rows}))
    if distance > 1e-5:
        raise SystemExit("K = 0 is not the base model")


def as_row(run: Run, zero: Run) -> dict[str, Any]:
    """Print one run and return what is stored of it."""
    low, high = interval(run.ndcg, zero.ndcg)
    steps = "" if run.query_steps is None else f"  steps {run.query_steps:.1f} (queries) {run.document_steps:.1f} (documents)"
    print(f"{run.label:<80} nDCG@10 {run.ndcg.mean():6.2f}  to K = 0 [{low:+.2f}, {high:+.2f}]  {run.seconds:6.1f} s{steps}", flush=True)
    return {
        "label": run.label,
        "ndcg@10": float(run.ndcg.mean()),
        "difference_to_k0_95": [low, high],
        "seconds": run.seconds,
        "query_steps": run.query_steps,
        "document_steps": run.document_steps,
    }


if __name__ == "__main__":
    main()
