"""The two premises of the paper, each beside what would be seen if nothing were learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from genembed.analyse.intervals import Bootstrap, Estimate, estimate
from genembed.analyse.kept import Kept
from genembed.analyse.states import States

DRAWS = 20
"""Draws of each null model for each query."""


@dataclass(frozen=True, eq=False)
class Rise:
    """How s_k grows with k (premise 1), in the model or in one of its null models."""

    name: str
    correlation: Float[np.ndarray, "values"]
    """Spearman's correlation of k and s_k, of every query (and draw)."""
    remainder: Float[np.ndarray, "steps_minus_1"]
    """Median over queries (and draws) of 1 - s_2 .. 1 - s_K."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """What s_k says of the ranking (premise 2)."""

    jaccard: list[Estimate]
    """Mean Jaccard@10 with step K, at steps 1 .. K."""
    within: Float[np.ndarray, "queries"]
    """Spearman over steps 2 .. K-1, for each query: s_k and Jaccard@10. Both grow with k whatever the model does. NaN: one is constant."""
    change: Float[np.ndarray, "queries"]
    """The same of s_k and Jaccard@10 of steps k-1 and k: the change of the ranking at the step itself."""
    across: Float[np.ndarray, "steps_minus_2"]
    """Spearman over queries, at steps 2 .. K-1: does s_k tell which queries are nearer to their final ranking? Free of the growth."""


def rises(states: States, *, seed: int) -> list[Rise]:
    """Measure premise 1 and its null models.

    - *permuted*: the same g_1 .. g_K of each query in random order. What still rises is not the order in which they are generated.
    - *random*: g_k with the same length and the same component along their mean, otherwise in a random direction, so that the mean
      is the same in expectation. What still rises is averaging alone.
    """
    rng = np.random.default_rng(seed)
    return [
        _rise("observed", iter([states])),
        _rise("permuted", (_permuted(states, rng) for _ in range(DRAWS))),
        _rise("random", (_random(states, rng) for _ in range(DRAWS))),
    ]


def agreement(kept: Kept, bootstrap: Bootstrap) -> Agreement:
    """Measure premise 2: that stable vectors find stable results, by Jaccard@10 in [0, 1] and Spearman's correlation.

    Args:
        kept: Of the queries.
        bootstrap: Resamples of the same queries.
    """
    jaccard, stability = kept.development.jaccard, kept.development.stability
    results = kept.development.top
    shared = (results[:, 1:, :, None] == results[:, :-1, None, :]).any(-1).sum(-1)
    consecutive = shared / (2 * results.shape[2] - shared)
    means = bootstrap.means(jaccard.T)
    return Agreement(
        [estimate(means[:, k]) for k in range(kept.steps)],
        within=spearman(stability[:, :-1], jaccard[:, 1:-1]),
        change=spearman(stability, consecutive),
        across=spearman(stability[:, :-1].T, jaccard[:, 1:-1].T),
    )


def spearman(first: Float[np.ndarray, "rows values"], second: Float[np.ndarray, "rows values"]) -> Float[np.ndarray, "rows"]:
    """Return Spearman's correlation of each pair of rows, ties sharing their mean rank; NaN where one of them is constant."""
    if not first.shape[1]:
        return np.full(len(first), np.nan)
    ranks = [rankdata(values, axis=1) for values in (first, second)]
    a, b = (own - own.mean(axis=1, keepdims=True) for own in ranks)
    with np.errstate(invalid="ignore"):
        result: np.ndarray = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return result


def stability_of(states: States) -> Float[np.ndarray, "texts steps_minus_1"]:
    """Return s_2 .. s_K in float64, from the sums."""
    sums = states.totals[:, 1:].astype(np.float64)
    vectors = sums / np.linalg.norm(sums, axis=-1, keepdims=True)
    return np.asarray((vectors[:, 1:] * vectors[:, :-1]).sum(-1))


def _rise(name: str, worlds: Iterator[States]) -> Rise:
    scores = np.concatenate([stability_of(world) for world in worlds])
    steps = np.broadcast_to(np.arange(scores.shape[1], dtype=float), scores.shape)
    return Rise(name, spearman(scores, steps), np.median(1 - scores, axis=0))


def _permuted(states: States, rng: np.random.Generator) -> States:
    order = rng.random(states.generated.shape[:2]).argsort(axis=1)
    return _resummed(states, np.take_along_axis(states.generated, order[..., None], axis=1))


def _random(states: States, rng: np.random.Generator) -> States:
    generated = states.generated.astype(np.float64)
    mean = generated.mean(axis=1, keepdims=True)
    axis = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-30)
    along = (generated * axis).sum(-1, keepdims=True)
    length = np.linalg.norm(generated - along * axis, axis=-1, keepdims=True)
    drawn = rng.standard_normal(generated.shape)
    drawn -= (drawn * axis).sum(-1, keepdims=True) * axis
    drawn *= length / np.linalg.norm(drawn, axis=-1, keepdims=True)
    return _resummed(states, along * axis + drawn)


def _resummed(states: States, generated: Float[np.ndarray, "texts steps hidden"]) -> States:
    """Add other generated states to the same start."""
    totals = np.concatenate([states.totals[:, :1], states.totals[:, :1] + generated.cumsum(axis=1)], axis=1)
    return replace(states, totals=totals)
