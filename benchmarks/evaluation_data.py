"""The evaluation sets that the benchmarks read from outside the repository, and how they are scored."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval

from genembed.testsets import read_retrieval_set, retrieval_files

DATA = Path(__file__).parents[2] / "shared" / "data"
"""Where the sets lie unless --data says otherwise."""


@dataclass(frozen=True)
class Retrieval:
    """A BEIR-style retrieval set."""

    documents: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]

    def sample(self, distractors: int, *, seed: int) -> Retrieval:
        """Keep all relevant documents and a number of others."""
        needed = {document for judged in self.relevant.values() for document in judged}
        others = sorted(set(self.documents) - needed)
        chosen = np.random.default_rng(seed).permutation(len(others))[:distractors]
        kept = needed | {others[i] for i in chosen}
        return Retrieval({name: text for name, text in self.documents.items() if name in kept}, self.queries, self.relevant)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a .jsonl file, or its gzipped form where that is the one there."""
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def retrieval(folder: Path, *, qrels: str = "qrels.tsv") -> Retrieval:
    """Read a retrieval set with the queries that have a judgement above zero."""
    corpus, queries, _ = retrieval_files(folder, judged=False)
    read = read_retrieval_set(corpus, queries, folder / qrels)
    assert read.relevant is not None
    return Retrieval(read.documents, read.queries, read.relevant)


def ndcg_at_10(scores: np.ndarray, data: Retrieval) -> np.ndarray:
    """Return nDCG@10 of every query, from scores [queries, documents] in the set's own order, in percent."""
    names, queries = list(data.documents), list(data.queries)
    top = np.argsort(-scores, axis=1, kind="stable")[:, :100]
    run = {query: {names[d]: float(scores[i, d]) for d in top[i]} for i, query in enumerate(queries)}
    values = pytrec_eval.RelevanceEvaluator(data.relevant, {"ndcg_cut.10"}).evaluate(run)
    return 100 * np.asarray([values[query]["ndcg_cut_10"] for query in queries])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation, in percent."""
    from scipy.stats import spearmanr

    return 100 * float(spearmanr(first, second).statistic)


def few_shot_accuracy(vectors: np.ndarray, labels: list[str], *, shots: int, seed: int) -> float:
    """Return the accuracy, in percent, of logistic regression on `shots` texts of each label, on all others."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    rng, train = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    names = np.asarray(labels)
    for label in sorted(set(labels)):
        train[rng.permutation(np.flatnonzero(names == label))[:shots]] = True
    model = LogisticRegression(max_iter=200).fit(vectors[train], names[train])
    return 100 * float(model.score(vectors[~train], names[~train]))


def accuracy_from_shots(
    train: np.ndarray, train_labels: list[str], test: np.ndarray, test_labels: list[str], *, shots: int, draws: int
) -> float:
    """Return the accuracy, in percent, on test texts of logistic regression on `shots` training texts of each label, mean over draws."""
    from sklearn.linear_model import LogisticRegression

    names, values = np.asarray(train_labels), []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        chosen = np.concatenate([rng.permutation(np.flatnonzero(names == label))[:shots] for label in sorted(set(train_labels))])
        model = LogisticRegression(max_iter=200).fit(train[chosen], names[chosen])
        values.append(model.score(test, np.asarray(test_labels)))
    return 100 * float(np.mean(values))
