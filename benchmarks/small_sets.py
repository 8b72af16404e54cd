"""Small versions of the test and development sets, for experiments of which there are many: a minute of one thread for every K.

They serve comparisons between runs that see the same texts, not comparisons with published scores. Texts are read bare.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from curves import EvaluationSet
from evaluation_data import Retrieval, accuracy_from_shots, json_lines, ndcg_at_10, retrieval, spearman

SHOTS = 16

TEST_SETS = {
    "stsb": "STS-B, 300 test pairs, Spearman",
    "sick": "SICK, 200 test pairs, Spearman",
    "scifact": "SciFact, 75 test queries over their documents and 100 others, nDCG@10",
    "fiqa_mini": "FiQA, 120 test questions over their answers, nDCG@10",
    "banking77": "Banking77, 12 intents, 16 shots each, 150 test texts, accuracy",
    "trec_qc": "TREC question classes, 6 coarse ones, 16 shots each, 150 test questions, accuracy",
}
"""What is measured, and on what part of each set: the first ones of a fixed random order."""

DEVELOPMENT_SETS = {
    "stsb_dev": "STS-B, 300 development pairs, Spearman",
    "scifact_train": "SciFact, 75 training queries over their documents and 100 others, nDCG@10",
    "banking77_train": "Banking77, 12 other intents, training texts alone: 16 shots each, 150 others, accuracy",
}
"""The same for choices; no text of them is in a test set but SciFact's documents."""


def test_sets(data: Path) -> Iterator[EvaluationSet]:
    """Read the sets of `TEST_SETS`."""
    yield _pairs(data, "stsb", "stsb", "test", 300)
    yield _pairs(data, "sick", "sick", "test", 200)
    yield _search(data, "scifact", "scifact", "qrels.tsv", queries=75, others=100)
    yield _search(data, "fiqa_mini", "fiqa_mini", "qrels.tsv", queries=120, others=0)
    yield _classes(data, "banking77", "banking77", "test", slice(12))
    yield _classes(data, "trec_qc", "trec_qc", "test", slice(None))


def development_sets(data: Path) -> Iterator[EvaluationSet]:
    """Read the sets of `DEVELOPMENT_SETS`."""
    yield _pairs(data, "stsb_dev", "stsb", "dev", 300)
    yield _search(data, "scifact_train", "scifact", "qrels_train.tsv", queries=75, others=100)
    yield _classes(data, "banking77_train", "banking77", "train", slice(12, 24))


def _shuffled(rows: list[Any]) -> list[Any]:
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def _pairs(data: Path, name: str, file: str, split: str, count: int) -> EvaluationSet:
    rows = _shuffled([row for row in json_lines(data / "sts" / f"{file}.jsonl") if row["split"] == split])[:count]
    gold = np.asarray([row["score"] for row in rows])
    texts = {"first": [row["sentence1"] for row in rows], "second": [row["sentence2"] for row in rows]}
    return EvaluationSet(name, texts, lambda v: spearman((v["first"] * v["second"]).sum(-1), gold))


def _search(data: Path, name: str, folder: str, qrels: str, *, queries: int, others: int) -> EvaluationSet:
    whole = retrieval(data / "retrieval" / folder, qrels=qrels)
    chosen = _shuffled(list(whole.queries))[:queries]
    relevant = {query: whole.relevant[query] for query in chosen}
    read = Retrieval(whole.documents, {query: whole.queries[query] for query in chosen}, relevant).sample(others, seed=0)
    texts = {"queries": list(read.queries.values()), "documents": list(read.documents.values())}
    return EvaluationSet(name, texts, lambda v: float(ndcg_at_10(v["queries"] @ v["documents"].T, read).mean()))


def _classes(data: Path, name: str, file: str, split: str, labels: slice) -> EvaluationSet:
    """Take 16 training texts of each label, and 150 texts of a split that are none of these."""
    rows = list(json_lines(data / "classification" / f"{file}.jsonl"))
    kept = set(_shuffled(sorted({row["label"] for row in rows}))[labels])
    shots: dict[str, list[str]] = {label: [] for label in sorted(kept)}
    rest = []
    for row in _shuffled([row for row in rows if row["label"] in kept]):
        if row["split"] == "train" and len(shots[row["label"]]) < SHOTS:
            shots[row["label"]].append(row["text"])
        elif row["split"] == split:
            rest.append(row)
    test, test_labels = [row["text"] for row in rest[:150]], [row["label"] for row in rest[:150]]
    train, train_labels = [text for own in shots.values() for text in own], [label for label in shots for _ in range(SHOTS)]
    return EvaluationSet(
        name,
        {"train": train, "test": test},
        lambda v: accuracy_from_shots(v["train"], train_labels, v["test"], test_labels, shots=SHOTS, draws=1),
    )
