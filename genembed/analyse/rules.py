"""Halting rules beyond ConvergeStop, replayed on queries that were refined to the end.

Each is a frozen value: from what is kept of n queries to the steps at which each would be finished; k* is the first of them, else K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from genembed.analyse.kept import Kept
from genembed.calibrate.replay import halting_steps
from genembed.errors import ConfigurationError
from genembed.halting import ConvergeStop, FixedSteps


@runtime_checkable
class ReplayedRule(Protocol):
    """From what is kept of queries to the steps at which they are finished."""

    def __call__(self, kept: Kept) -> Bool[np.ndarray, "queries steps"]:
        """Tell at which steps each query is finished."""


@dataclass(frozen=True)
class RemainingMovement:
    """Halt when the estimated angle between z_k and z_K is at most `angle`.

        k* = min{ k >= 2 : angle_k <= angle },     angle_k as in genembed.analyse.kept.remaining_movement

    ConvergeStop reads the last move; this reads what is left, so steps that are short because k is large do not count as done.

    Args:
        angle: Radians, above 0.
    """

    angle: float

    def __call__(self, kept: Kept) -> Bool[np.ndarray, "queries steps"]:
        """Compare the estimate with the angle."""
        return kept.movement <= self.angle


@dataclass(frozen=True)
class StateStability:
    """Halt when consecutive generated states point the same way for `patience` steps.

        k* = min{ k : cos(g_{k-1}, g_k) >= threshold, for the last `patience` steps }

    Free of the 1/k that averaging puts into s_k.

    Args:
        threshold: A cosine.
        patience: Steps in a row, at least 1.
    """

    threshold: float
    patience: int = 1

    def __call__(self, kept: Kept) -> Bool[np.ndarray, "queries steps"]:
        """Compare the cosines with the threshold."""
        return _in_a_row(kept.alignment >= self.threshold, self.patience)


@dataclass(frozen=True)
class Margin:
    """Halt when the ten nearest documents can no longer change.

        k* = min{ k : gap_k > 2 b_k },   gap_k = <z_k, d_10> - <z_k, d_11>,   b_k >= |z_K - z_k|

    because |<z_K, d> - <z_k, d>| <= |z_K - z_k| for a unit vector d: no document outside can pass one inside. It says nothing about the
    order of the ten. The true |z_K - z_k| is unknown at step k; in its place stands the chord of the estimated angle, times a scale:

        b_k = scale * 2 sin(angle_k / 2),     angle_k as in genembed.analyse.kept.remaining_movement

    Args:
        scale: Above 1 more careful than the estimate, below 1 bolder.
    """

    scale: float = 1.0

    def __call__(self, kept: Kept) -> Bool[np.ndarray, "queries steps"]:
        """Compare the gap with the bound."""
        return cannot_change(kept.gap, self.scale * chord(kept.movement))


@dataclass(frozen=True)
class RankStability:
    """Halt when the ten nearest documents have been the same for `patience` steps in a row.

        k* = min{ k : top_k = top_{k-1} = ... = top_{k-patience} }       (as sets)

    It searches at every step, which costs more than a step where the corpus is large.

    Args:
        patience: Unchanged steps in a row, at least 1.
    """

    patience: int = 1

    def __call__(self, kept: Kept) -> Bool[np.ndarray, "queries steps"]:
        """Compare the results of consecutive steps."""
        results = np.sort(kept.development.top, axis=-1)
        same = (results[:, 1:] == results[:, :-1]).all(-1)
        return _in_a_row(np.concatenate([np.zeros((len(kept), 1), dtype=bool), same], axis=1), self.patience)


@dataclass(frozen=True)
class Oracle:
    """Halt at the first step with the ten documents of step K: no rule can know it, and none that keeps the results is faster.

    k* = min{ k : top_k = top_K }       (as sets)
    """

    def __call__(self, kept: Kept) -> Bool[np.ndarray, "queries steps"]:
        """Compare with the results at the end."""
        return np.asarray(kept.development.jaccard == 1.0)


Rule = ConvergeStop | FixedSteps | ReplayedRule

_NUMBERS = ("threshold", "patience", "angle", "scale", "steps")
"""Fields of rules that are chosen, not given."""


def steps_under(kept: Kept, rule: Rule) -> Int[np.ndarray, "queries"]:
    """Return k* of each query, 1 .. K; K where the rule never halts it."""
    if isinstance(rule, ConvergeStop | FixedSteps):
        return halting_steps(kept.development.stability, rule)
    finished = rule(kept)
    finished[:, -1] = True
    return np.asarray(finished.argmax(axis=1) + 1)


def cannot_change(gap: Float[np.ndarray, "queries steps"], bound: Float[np.ndarray, "queries steps"]) -> Bool[np.ndarray, "queries steps"]:
    """Whether a vector that moves by at most `bound` keeps the same documents on the near side of the gap.

    Args:
        gap: Score of the last document on the near side less that of the first beyond.
        bound: Distance of unit vectors.
    """
    return np.asarray(gap > 2 * bound)


def chord(angle: Float[np.ndarray, "queries steps"]) -> Float[np.ndarray, "queries steps"]:
    """Return the distance of two unit vectors at an angle; infinite for an infinite one, of which nothing is known."""
    return np.where(np.isfinite(angle), 2 * np.sin(np.minimum(np.nan_to_num(angle, posinf=0.0), np.pi) / 2), np.inf)


@dataclass(frozen=True, eq=False)
class Family:
    """Rules that differ in one number."""

    name: str
    rule: Callable[[float], Rule]
    values: Callable[[Kept], Float[np.ndarray, "values"]] = field(repr=False)
    """The numbers at which any query's k* can change."""

    def matched(self, kept: Kept, target: float) -> Rule:
        """Return the member whose mean k* is nearest to `target`.

        No judgement is read. Mean k* is monotone in the number, so the search halves the candidates.

        Args:
            kept: Queries.
            target: Mean steps, in [1, K].

        Raises:
            ConfigurationError: If there is no candidate.
        """
        values = np.unique(self.values(kept))
        if not len(values):
            raise ConfigurationError(f"{self.name}: no query gives a number to choose from.")

        def mean(place: int) -> float:
            return float(steps_under(kept, self.rule(float(values[place]))).mean())

        rising = mean(len(values) - 1) >= mean(0)
        low, high = 0, len(values) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if (mean(middle) < target) == rising else (low, middle)
        return self.rule(float(values[min((low, high), key=lambda place: abs(mean(place) - target))]))


def converge_stop(patience: int, steps: int) -> Family:
    """Return ConvergeStop over its threshold."""
    return Family(
        f"ConvergeStop, M = {patience}",
        lambda threshold: ConvergeStop(threshold, patience=patience, max_steps=steps),
        # One above every cosine stands for the rule that never halts.
        lambda kept: np.append(kept.development.stability.astype(np.float64).ravel(), 1.5),
    )


def families(steps: int) -> tuple[Family, ...]:
    """Return the rules that are compared, each over its number."""
    return (
        converge_stop(2, steps),
        Family("remaining movement", RemainingMovement, lambda kept: kept.movement[np.isfinite(kept.movement)]),
        Family("state stability", StateStability, lambda kept: np.append(kept.alignment.ravel(), 1.5)),
        Family("margin", Margin, _margins),
        Family("rank stability", lambda patience: RankStability(int(patience)), lambda kept: np.arange(1.0, kept.steps + 1)),
    )


def _margins(kept: Kept) -> Float[np.ndarray, "values"]:
    """Return the scales at which some query's gap is just too small."""
    reach = 2 * chord(kept.movement[:, :-1])
    known = np.isfinite(reach) & (reach > 0)
    return np.asarray((kept.gap[:, :-1][known] / reach[known]).astype(np.float64))


def _in_a_row(holds: Bool[np.ndarray, "queries steps"], count: int) -> Bool[np.ndarray, "queries steps"]:
    """Whether something held at a step and at the `count - 1` steps before it."""
    result = holds.copy()
    for back in range(1, count):
        result[:, back:] &= holds[:, :-back] if back else holds
        result[:, :back] = False
    return result


def numbers_of(rule: Rule) -> str:
    """Return what was chosen of a rule, as `threshold=0.998, patience=2`: for tables that have its name elsewhere."""
    return ", ".join(f"{name}={value:.9g}" for name, value in vars(rule).items() if name in _NUMBERS)
