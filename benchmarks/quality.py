"""Quality of a model on seven test sets, for every K, beside BM25 and its own base model.

    python benchmarks/quality.py [--model mini] [--data ../shared/data] [--sets stsb sick ...]

Spearman (STS-B and SICK test), nDCG@10 (SciFact, Cranfield, and the 648 question-answer pairs of FiQA as their own corpus), accuracy
from 16 shots of each label, mean of five draws (Banking77, TREC-QC test). Every text is refined once; all K and the halting rule
are scored on the same vectors. K = 0 of `mini` is its base, all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from curves import STEPS, EvaluationSet
from evaluation_data import DATA, Retrieval, accuracy_from_shots, json_lines, ndcg_at_10, retrieval, spearman
from results_file import RESULTS, write
from scifact import run_bm25

import genembed

SHOWN = (0, 1, 3, 5, 10, 20)


def sts(data: Path, name: str) -> EvaluationSet:
    """Read the test pairs of an STS set."""
    pairs = [row for row in json_lines(data / "sts" / f"{name}.jsonl") if row["split"] == "test"]
    gold = np.asarray([row["score"] for row in pairs])
    return EvaluationSet(
        name,
        {"first": [row["sentence1"] for row in pairs], "second": [row["sentence2"] for row in pairs]},
        lambda v: spearman((v["first"] * v["second"]).sum(-1), gold),
    )


def search(data: Path, name: str) -> tuple[EvaluationSet, Retrieval]:
    """Read a retrieval set."""
    read = retrieval(data / "retrieval" / name)
    texts = {"queries": list(read.queries.values()), "documents": list(read.documents.values())}
    return EvaluationSet(name, texts, lambda v: float(ndcg_at_10(v["queries"] @ v["documents"].T, read).mean())), read


def classes(data: Path, name: str) -> EvaluationSet:
    """Read a classification set: training texts to draw shots from, test texts."""
    rows = list(json_lines(data / "classification" / f"{name}.jsonl"))
    parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
    pool, pool_labels = drawn(parts["train"], per_label=80)
    test_labels = [row["label"] for row in parts["test"]]
    return EvaluationSet(
        name,
        {"train": pool, "test": [row["text"] for row in parts["test"]]},
        lambda v: accuracy_from_shots(v["train"], pool_labels, v["test"], test_labels, shots=16, draws=5),
    )


def drawn(rows: list[dict[str, Any]], *, per_label: int) -> tuple[list[str], list[str]]:
    """Draw some texts of every label, from which five draws of shots are taken."""
    kept: dict[str, list[str]] = {}
    for i in np.random.default_rng(0).permutation(len(rows)):
        kept.setdefault(rows[i]["label"], []).append(rows[i]["text"])
    pairs = [(text, label) for label, texts in sorted(kept.items()) for text in texts[:per_label]]
    return [text for text, _ in pairs], [label for _, label in pairs]


def sets_of(data: Path) -> dict[str, Callable[[], tuple[EvaluationSet, float | None]]]:
    """Return how each set is read, with BM25's score where it is one of retrieval."""

    def with_bm25(name: str) -> tuple[EvaluationSet, float | None]:
        made, read = search(data, name)
        return made, float(run_bm25(read).ndcg.mean())

    return {
        "stsb": lambda: (sts(data, "stsb"), None),
        "sick": lambda: (sts(data, "sick"), None),
        "scifact": lambda: with_bm25("scifact"),
        "fiqa_mini": lambda: with_bm25("fiqa_mini"),
        "cranfield": lambda: with_bm25("cranfield"),
        "banking77": lambda: (classes(data, "banking77"), None),
        "trec_qc": lambda: (classes(data, "trec_qc"), None),
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=None)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = genembed.load(arguments.model)
    rule, readers = model.settings.halt, sets_of(arguments.data)
    rows: dict[str, Any] = {}
    for name in arguments.sets or list(readers):
        read, bm25 = readers[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # many abstracts are longer than 256 tokens
            curves = read.embed(model)
        one_pass = not rule.max_steps
        halted, mean_steps = (curves.at(0), 0.0) if one_pass else curves.halted(rule)
        curve = [curves.at(0)] if one_pass else [curves.at(k) for k in range(STEPS + 1)]
        rows[name] = {"curve": curve, "halted": halted, "mean_steps": mean_steps, "bm25": bm25}
        shown = "  ".join(f"K={k} {curve[k]:.2f}" for k in SHOWN if k < len(curve))
        print(f"{name:<12} {shown}  halted {halted:.2f} at {mean_steps:.1f}{'' if bm25 is None else f'  BM25 {bm25:.2f}'}", flush=True)
    means = np.mean([row["curve"] for row in rows.values()], axis=0)
    print("mean         " + "  ".join(f"K={k} {means[k]:.2f}" for k in SHOWN if k < len(means)))
    theme = "quality" if arguments.model == "mini" else f"quality-{Path(arguments.model).name}"
    path = write(theme, {"model": arguments.model, "rule": repr(rule), "sets": rows, "mean": means.tolist()}, folder=arguments.output)
    print("written:", path)
    print(json.dumps({f"K={k}": round(float(means[k]), 2) for k in SHOWN if k < len(means)}))


if __name__ == "__main__":
    main()
