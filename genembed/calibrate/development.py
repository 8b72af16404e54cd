"""Development queries, refined to the end once: what each would have found at every step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int

from genembed.embedder import Embedder
from genembed.errors import ConfigurationError, missing_extra
from genembed.halting import FixedSteps
from genembed.testsets import RetrievalSet

DEPTH = 10
"""Results looked at: nDCG@10 and Jaccard@10."""

_SCORES = 1 << 24
"""Scores in memory at once, 64 MiB of them."""


@dataclass(frozen=True, eq=False)
class Development:
    """Results of n queries at steps 1 .. K, enough to replay any rule that reads steps and cosines."""

    stability: Float[np.ndarray, "queries steps_minus_1"]
    """s_2 .. s_K."""
    top: Int[np.ndarray, "queries steps depth"]
    """Places of the nearest documents at every step, nearest first."""
    ndcg: Float[np.ndarray, "queries steps"] | None
    """nDCG@10 in [0, 1]; None without judgements."""

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.top)

    @property
    def max_steps(self) -> int:
        """K, the steps to which every query was refined."""
        return int(self.top.shape[1])

    @cached_property
    def jaccard(self) -> Float[np.ndarray, "queries steps"]:
        """Overlap |A & B| / |A | B| of the results at each step with those of step K."""
        shared = (self.top[:, :, :, None] == self.top[:, -1:, None, :]).any(-1).sum(-1)
        return np.asarray(shared / (2 * self.top.shape[2] - shared))

    def select(self, queries: Int[np.ndarray, "kept"]) -> Development:
        """Return some of the queries."""
        return Development(self.stability[queries], self.top[queries], None if self.ndcg is None else self.ndcg[queries])


def develop(
    model: Embedder, data: RetrievalSet, *, instruction: str | None = None, max_steps: int | None = None, show_progress_bar: bool = False
) -> Development:
    """Refine all queries to the end, and search with every z_k.

    Documents are refined to the end as well, whatever the rule will be: a rule that halts documents too changes the index, and is not
    what is calibrated here.

    Args:
        model: A model that refines.
        data: Documents, queries and perhaps judgements.
        instruction: Of the queries; the model's own one if None.
        max_steps: K; the most steps of the model's own rule if None.
        show_progress_bar: Show bars on stderr.

    Raises:
        ConfigurationError: If the model does not refine, or there are not more documents than results are looked at.
    """
    steps = full_steps(model, data, max_steps)
    wanted = model.settings.query_instruction if instruction is None else instruction
    queries = model.refine(
        list(data.queries.values()), instruction=wanted, halt=FixedSteps(steps), keep_trajectory=True, show_progress_bar=show_progress_bar
    )
    documents = model.encode_document(list(data.documents.values()), steps=steps, show_progress_bar=show_progress_bar)
    assert queries.trajectory is not None
    top = nearest(queries.trajectory, documents)
    return Development(queries.stability, top, None if data.relevant is None else ndcg_at_10(top, data))


def full_steps(model: Embedder, data: RetrievalSet, max_steps: int | None) -> int:
    """Return K, the steps of the full refinement: those of the model's own rule if None is given.

    Raises:
        ConfigurationError: If the model does not refine, or there are not more documents than results are looked at.
    """
    steps = model.settings.halt.max_steps if max_steps is None else max_steps
    if steps < 2:
        raise ConfigurationError(
            f"{model.source.name} with {steps} steps: there is nothing to halt; calibration needs a model that refines, two steps or more."
        )
    if len(data.documents) <= DEPTH:
        raise ConfigurationError(f"{len(data.documents)} documents: a corpus of more than {DEPTH} is needed to compare the best {DEPTH}.")
    return steps


def nearest(
    trajectory: Float[np.ndarray, "queries steps hidden"], documents: Float[np.ndarray, "documents hidden"]
) -> Int[np.ndarray, "queries steps depth"]:
    """Search every z_k exactly; the places of the nearest documents, nearest first."""
    return scored(trajectory, documents, depth=DEPTH)[1]


def scored(
    trajectory: Float[np.ndarray, "queries steps hidden"], documents: Float[np.ndarray, "documents hidden"], *, depth: int
) -> tuple[Float[np.ndarray, "queries steps depth"], Int[np.ndarray, "queries steps depth"]]:
    """Search every z_k exactly; scores, which are cosines of unit vectors, and places of the `depth` nearest documents, nearest first."""
    vectors = torch.from_numpy(np.ascontiguousarray(trajectory)).flatten(0, 1)
    targets = torch.from_numpy(np.ascontiguousarray(documents)).T
    size = max(1, _SCORES // len(documents))
    found = [(vectors[start : start + size] @ targets).topk(depth) for start in range(0, len(vectors), size)]
    scores, places = (torch.cat(parts).view(*trajectory.shape[:2], depth).numpy() for parts in zip(*found, strict=True))
    return scores, places


def ndcg_at_10(top: Int[np.ndarray, "queries steps depth"], data: RetrievalSet) -> Float[np.ndarray, "queries steps"]:
    """Return nDCG@10 of every query at every step, in [0, 1].

    Args:
        top: Places of the documents found, nearest first.
        data: With judgements.

    Raises:
        MissingExtraError: If pytrec_eval is not installed.
    """
    try:
        import pytrec_eval
    except ModuleNotFoundError:
        raise missing_extra("calibrate", "pytrec-eval-terrier") from None
    assert data.relevant is not None
    names, queries = list(data.documents), list(data.queries)
    evaluator = pytrec_eval.RelevanceEvaluator(data.relevant, {f"ndcg_cut.{DEPTH}"})
    result = np.zeros(top.shape[:2])
    for k in range(top.shape[1]):
        run = {query: {names[d]: float(DEPTH - rank) for rank, d in enumerate(top[i, k])} for i, query in enumerate(queries)}
        values = evaluator.evaluate(run)
        result[:, k] = [values[query][f"ndcg_cut_{DEPTH}"] for query in queries]
    return result
