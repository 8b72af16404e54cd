"""What the analysis keeps of every query at every step; whatever a replayed rule may read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from genembed.analyse.states import States
from genembed.calibrate.development import DEPTH, Development, ndcg_at_10, scored
from genembed.testsets import RetrievalSet


@dataclass(frozen=True, eq=False)
class Kept:
    """n queries at steps 1 .. K."""

    development: Development
    """Stability, results and nDCG@10."""
    gap: Float[np.ndarray, "queries steps"]
    """Score of rank 10 less that of rank 11."""
    movement: Float[np.ndarray, "queries steps"]
    """Estimated angle between z_k and z_K, radians (`remaining_movement`); infinite at step 1."""
    alignment: Float[np.ndarray, "queries steps"]
    """cos(g_{k-1}, g_k); -1 at step 1."""
    distance: Float[np.ndarray, "queries steps"]
    """|z_K - z_k|, which no rule may read: it is known at the end alone."""

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.gap)

    @property
    def steps(self) -> int:
        """K."""
        return self.development.max_steps

    @property
    def measure(self) -> str:
        """Name of the quality."""
        return "Jaccard@10" if self.development.ndcg is None else "nDCG@10"

    @property
    def quality(self) -> Float[np.ndarray, "queries steps"]:
        """nDCG@10; without judgements Jaccard@10 with the results at step K; in [0, 1]."""
        return self.development.jaccard if self.development.ndcg is None else self.development.ndcg

    def select(self, queries: Int[np.ndarray, "kept"]) -> Kept:
        """Return some of the queries."""
        own = (self.gap[queries], self.movement[queries], self.alignment[queries], self.distance[queries])
        return Kept(self.development.select(queries), *own)

    def at(self, steps: Int[np.ndarray, "*splits queries"]) -> Float[np.ndarray, "*splits queries"]:
        """Return the quality of every query at a step of its own."""
        return np.asarray(self.quality[np.arange(len(self)), steps - 1])


def keep(states: States, documents: Float[np.ndarray, "documents hidden"], data: RetrievalSet) -> Kept:
    """Search with every z_k, and measure what rules read.

    Args:
        states: Of the queries, in the order of `data.queries`.
        documents: Unit vectors, in the order of `data.documents`; more than ten.
        data: Names and judgements.
    """
    vectors = states.vectors
    scores, top = scored(vectors, documents, depth=DEPTH + 1)
    top = np.ascontiguousarray(top[:, :, :DEPTH])
    generated = states.generated
    lengths = np.linalg.norm(generated, axis=-1)
    cosines = (generated[:, 1:] * generated[:, :-1]).sum(-1) / np.maximum(lengths[:, 1:] * lengths[:, :-1], 1e-30)
    return Kept(
        Development(states.stability, top, None if data.relevant is None else ndcg_at_10(top, data)),
        gap=scores[:, :, DEPTH - 1] - scores[:, :, DEPTH],
        movement=remaining_movement(states),
        alignment=np.concatenate([np.full((len(cosines), 1), -1.0), cosines], axis=1),
        distance=np.linalg.norm(vectors[:, -1:] - vectors, axis=-1),
    )


def remaining_movement(states: States) -> Float[np.ndarray, "texts steps"]:
    """Estimate the angle between z_k and z_K from what has been generated up to step k.

        T_K / (w+K) - T_k / (w+k) = (K-k) / (w+K) * (mean of g_{k+1} .. g_K  -  T_k / (w+k))

    The states to come are taken for draws like those seen, around the same mean mu with the same total variance. Only what is
    orthogonal to z_k turns it:

        angle_k^2 = ((K-k) / (w+K))^2 * ( mu^2 + v_k / (K-k) ) / |T_k / (w+k)|^2             (all orthogonal to z_k)
        mu^2 = max( |m_k|^2 + v_k / k * (k-w) / (k+w), 0 )
        m_k = (g_1 + ... + g_k) / k,     v_k = sum_i |g_i - m_k|^2 / (k-1)

    The mean m_k misses mu by v_k / k, and is itself a part k / (w+k) of T_k: where w = 0, m_k is parallel to z_k and all of its error
    is to be added; where w is large, T_k is the prompt's and the error is to be taken off. Exact in the mean square for independent states
    and small angles, but for the maximum; too small where the states drift. One state has no spread: the angle at step 1 is infinite.

    Returns:
        Radians.
    """
    steps, weight = states.steps, states.prompt_weight
    generated, vectors = states.generated.astype(np.float64), states.vectors.astype(np.float64)
    lengths = np.linalg.norm(states.totals[:, 1:], axis=-1) / (weight + np.arange(1, steps + 1))
    angles = np.full(lengths.shape, np.inf)
    angles[:, -1] = 0.0
    for k in range(2, steps):
        seen, vector = generated[:, :k], vectors[:, k - 1]
        along = np.einsum("tkh,th->tk", seen, vector)
        across = seen - along[..., None] * vector[:, None]
        spread = across.var(axis=1, ddof=1).sum(-1)
        drift = np.maximum((across.mean(axis=1) ** 2).sum(-1) + spread / k * (k - weight) / (k + weight), 0.0)
        left = steps - k
        angles[:, k - 1] = left / (weight + steps) * np.sqrt(drift + spread / left) / lengths[:, k - 1]
    return angles
