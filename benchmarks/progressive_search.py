"""Progressive search: queries that halt when their ten nearest documents no longer change, beside ConvergeStop and a fixed K.

    python benchmarks/progressive_search.py [--model mini] [--sets scifact fiqa_mini] [--queries 150] [--others 500] [--out FOLDER]

The documents are embedded once, under the model's own rule, and kept in an index; only how the queries are refined differs. For every
rule: the steps of a query, the share of the ten nearest documents that K = 20 finds too, nDCG@10, and the time of a query, alone, with
its searches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from evaluation_data import DATA, Retrieval, ndcg_at_10, retrieval
from markdown import table
from results_file import RESULTS, machine, write

import genembed
from genembed import ConvergeStop, Embedder, FixedSteps, HaltingRule
from genembed.index import Index, Passage
from genembed.index.rank_stop import RankStop

MOST = 20
HITS = 10
PATIENCES = (1, 2, 3)
FIXED = (1, 2, 3, 5, 10)
TIMED = 20
"""Queries that are timed one by one."""


def rules(index: Index, own: HaltingRule, thresholds: Sequence[float]) -> dict[str, HaltingRule]:
    """Return what is compared, by its name in the table; K = 20 first, which the others are measured against."""
    chosen: dict[str, HaltingRule] = {f"K = {MOST}": FixedSteps(MOST), **{f"K = {steps}": FixedSteps(steps) for steps in FIXED}}
    stops = [ConvergeStop(threshold=threshold, max_steps=MOST) for threshold in thresholds]
    if isinstance(own, ConvergeStop):
        stops.insert(0, replace(own, max_steps=MOST))
    chosen |= {repr(stop): stop for stop in stops}
    return chosen | {f"RankStop(patience={patience})": RankStop(index=index, patience=patience, max_steps=MOST) for patience in PATIENCES}


def sampled(data: Retrieval, *, queries: int, others: int) -> Retrieval:
    """Keep some queries, their documents, and a number of others; the same every time."""
    names = list(data.queries)
    kept = [names[place] for place in np.random.default_rng(0).permutation(len(names))[:queries]]
    return Retrieval(data.documents, {name: data.queries[name] for name in kept}, {name: data.relevant[name] for name in kept}).sample(
        others, seed=0
    )


def compare(model: Embedder, index: Index, data: Retrieval, thresholds: Sequence[float]) -> dict[str, Mapping[str, float]]:
    """Search for every query under every rule."""
    place = {name: number for number, name in enumerate(data.documents)}
    queries, instruction = list(data.queries.values()), model.settings.query_instruction
    first: list[set[str]] = []
    results: dict[str, Mapping[str, float]] = {}
    for name, rule in rules(index, model.settings.halt, thresholds).items():
        done = model.refine(queries, instruction=instruction, halt=rule)
        scores = np.full((len(queries), len(place)), -2.0)
        found = []
        for row, vector in enumerate(done.vectors):
            hits = index.search(vector, k=HITS)
            scores[row, [place[hit.reference] for hit in hits]] = [hit.score for hit in hits]
            found.append({hit.reference for hit in hits})
        first = first or found
        results[name] = {
            "steps": float(done.steps.mean()),
            "overlap_percent": 100 * float(np.mean([len(own & all_steps) / HITS for own, all_steps in zip(found, first, strict=True)])),
            "ndcg_at_10": float(ndcg_at_10(scores, data).mean()),
            "ms_per_query": 1000 * median(_seconds(model, index, query, rule) for query in queries[:TIMED]),
        }
    return results


def _seconds(model: Embedder, index: Index, query: str, rule: HaltingRule) -> float:
    begin = time.perf_counter()
    vector = model.refine([query], instruction=model.settings.query_instruction, halt=rule).vectors[0]
    index.search(vector, k=HITS)
    return time.perf_counter() - begin


def measure(model: Embedder, data: Retrieval, thresholds: Sequence[float]) -> dict[str, Any]:
    """Index a set's documents and compare the rules on its queries."""
    with tempfile.TemporaryDirectory() as folder:
        passages = [Passage(text, name, text[:80]) for name, text in data.documents.items()]
        index = Index.build(Path(folder, "index"), model, passages, show_progress_bar=True)
        return {"queries": len(data.queries), "documents": len(index), "rules": compare(model, index, data, thresholds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=["scifact", "fiqa_mini"])
    parser.add_argument("--queries", type=int, default=150, help="of each set, at most")
    parser.add_argument("--others", type=int, default=500, help="documents beside those that answer a query, at most")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.99, 0.998], help="of ConvergeStop, beside the model's own rule")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    print(json.dumps(machine(), indent=1))
    model, values = genembed.load(arguments.model), {}
    for name in arguments.sets:
        data = sampled(retrieval(arguments.data / "retrieval" / name), queries=arguments.queries, others=arguments.others)
        values[name] = measure(model, data, arguments.thresholds)
        rows = [[rule, *(f"{value:.2f}" for value in own.values())] for rule, own in values[name]["rules"].items()]
        print(f"{name}: {values[name]['queries']} queries, {values[name]['documents']} documents")
        print(table(["rule", "steps", "overlap with K = 20, %", "nDCG@10", "ms a query"], rows))
    print(write("progressive_search", {"model": arguments.model, "sets": values}, folder=arguments.out))
    print(json.dumps(values))


if __name__ == "__main__":
    main()
