"""Documents that are halted too: another index, and another quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from genembed.analyse.intervals import Estimate, estimate
from genembed.analyse.splits import Arm, Comparison
from genembed.calibrate.development import Development, ndcg_at_10, nearest
from genembed.calibrate.replay import halting_steps
from genembed.halting import FixedSteps
from genembed.testsets import RetrievalSet


@dataclass(frozen=True)
class Halting:
    """Quality where queries, documents, both or neither are halted."""

    queries: str
    """What is done with the queries."""
    documents: str
    """What is done with the documents."""
    query_steps: float
    """Mean steps of the test queries."""
    document_steps: float
    """Mean steps of the documents."""
    quality: Estimate
    to_full: Estimate
    """Quality less that of refining everything to the end."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Vectors of queries and documents at every step, and what is searched for."""

    data: RetrievalSet
    queries: Float[np.ndarray, "queries steps hidden"]
    documents: Float[np.ndarray, "documents steps hidden"]
    stability: Float[np.ndarray, "documents steps_minus_1"]
    """s_2 .. s_K of the documents."""

    @property
    def steps(self) -> int:
        """K."""
        return int(self.queries.shape[1])

    def quality(self, queries: Int[np.ndarray, "queries"], documents: Int[np.ndarray, "documents"]) -> Float[np.ndarray, "queries"]:
        """Search with each text at a step of its own; nDCG@10, or without judgements Jaccard@10 with the results of the full refinement."""
        top = self._search(queries, documents)
        if self.data.relevant is not None:
            return ndcg_at_10(top, self.data)[:, 0]
        full = self._search(np.full_like(queries, self.steps), np.full_like(documents, self.steps))
        return Development(np.zeros((len(top), 1)), np.concatenate([top, full], axis=1), None).jaccard[:, 0]

    def _search(self, queries: Int[np.ndarray, "queries"], documents: Int[np.ndarray, "documents"]) -> Int[np.ndarray, "queries 1 depth"]:
        chosen = [every[np.arange(len(every)), steps - 1] for every, steps in ((self.queries, queries), (self.documents, documents))]
        return nearest(chosen[0][:, None], chosen[1])


def halted_documents(corpus: Corpus, comparison: Comparison, arm: Arm) -> list[Halting]:
    """Compare halting neither, queries, documents and both, and both at fixed steps of the same mean.

    The rule chosen for the queries of a split halts the documents as well: no documents were developed on.
    """
    rules = arm.rules or (FixedSteps(corpus.steps),)
    halted = np.stack([halting_steps(corpus.stability, rule) for rule in rules])
    budgets = {"queries": comparison.budget(arm).steps, "documents": np.repeat(_rounded(halted), halted.shape[1], axis=1)}
    full = {"queries": np.full_like(arm.steps, corpus.steps), "documents": np.full_like(halted, corpus.steps)}
    cases = [
        (f"K = {corpus.steps}", f"K = {corpus.steps}", full["queries"], full["documents"]),
        ("halted", f"K = {corpus.steps}", arm.steps, full["documents"]),
        (f"K = {corpus.steps}", "halted", full["queries"], halted),
        ("halted", "halted", arm.steps, halted),
        ("fixed K = round(mean k*)", "fixed K = round(mean k*)", budgets["queries"], budgets["documents"]),
    ]
    values = [np.stack([corpus.quality(*pair) for pair in zip(queries, documents, strict=True)]) for _, _, queries, documents in cases]
    means = [comparison.bootstrap.means(own, comparison.splits.test).mean(axis=1) for own in values]
    test = comparison.splits.test
    return [
        Halting(
            *case[:2],
            query_steps=float(np.mean([own[mask].mean() for own, mask in zip(case[2], test, strict=True)])),
            document_steps=float(case[3].mean()),
            quality=estimate(mean),
            to_full=estimate(mean - means[0]),
        )
        for case, mean in zip(cases, means, strict=True)
    ]


def _rounded(steps: Int[np.ndarray, "splits texts"]) -> Int[np.ndarray, "splits 1"]:
    return np.asarray(np.maximum(1, np.round(steps.mean(axis=1, keepdims=True))), dtype=np.int64)
