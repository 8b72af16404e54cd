"""The paper's comparison: a threshold chosen on a part of the queries, measured on the others, over several splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from genembed.analyse.intervals import Bootstrap, Estimate, estimate, interpolated
from genembed.analyse.kept import Kept
from genembed.calibrate.choose import Loss, by_certificate, by_percentile
from genembed.calibrate.replay import halting_steps
from genembed.errors import ConfigurationError
from genembed.halting import ConvergeStop, FixedSteps

SHARE = 0.2
"""Of the queries, for development; the others are the test."""
SPLITS = 5
GRID = (1, 3, 5, 10, 15, 20)
"""Fixed K of the paper's figure 2."""
FEWEST = 10
"""Queries without which there is nothing to split."""

EFFECT = 0.002
"""The smaller of the leads over fixed K that the paper reports (table 1), in nDCG@10."""
_POWER = 1.96 + 0.84
"""Standard errors that an effect must be worth to be found in 80 % of experiments, at 5 % two-sided."""

_EPSILON = 0.005
"""Loss of nDCG@10 that the percentile rule, and the K that development chooses, accept."""
_BOUNDS: dict[Loss, float] = {"ndcg": 0.02, "jaccard": 0.05}
"""Loss that is certified."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Which queries develop and which test, split by split."""

    test: Bool[np.ndarray, "splits queries"]

    @classmethod
    def of(cls, queries: int, *, seed: int) -> Splits:
        """Draw the splits.

        Raises:
            ConfigurationError: If there are too few queries.
        """
        if queries < FEWEST:
            raise ConfigurationError(f"{queries} queries: at least {FEWEST} are needed, a fifth of them to choose a threshold on.")
        test = np.ones((SPLITS, queries), dtype=bool)
        for split in range(SPLITS):
            test[split, np.random.default_rng([seed, split]).permutation(queries)[: max(1, round(SHARE * queries))]] = False
        return cls(test)

    def __len__(self) -> int:
        """Number of splits."""
        return len(self.test)


@dataclass(frozen=True, eq=False)
class Arm:
    """A way to choose k, and what it chose."""

    name: str
    steps: Int[np.ndarray, "splits queries"]
    """k* of every query under the choice of each split."""
    rules: tuple[ConvergeStop | FixedSteps, ...] = ()
    """Chosen on each split; none where no rule was chosen."""

    @property
    def chosen(self) -> int:
        """On how many splits a rule that can halt was chosen."""
        return sum(isinstance(rule, ConvergeStop) for rule in self.rules)


@dataclass(frozen=True)
class Result:
    """An arm, measured: means over the splits of means over their test queries, with the interval over queries."""

    name: str
    quality: Estimate
    steps: Estimate
    deviation: float
    """Standard deviation of k* over queries, mean over splits."""
    savings: Estimate
    """Share of the steps of K."""
    to_full: Estimate
    """Quality less that of K."""
    to_curve: Estimate
    """Quality less that of fixed K at the same mean steps, read from the curve through every K."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What all measurements on the splits share."""

    kept: Kept
    splits: Splits
    bootstrap: Bootstrap

    def measure(self, arm: Arm) -> Result:
        """Measure an arm."""
        steps = self._means(arm.steps.astype(float))
        quality = self._means(self.kept.at(arm.steps))
        full = self._means(self.kept.at(np.full_like(arm.steps, self.kept.steps)))
        spread = [float(own[test].std()) for own, test in zip(arm.steps, self.splits.test, strict=True)]
        return Result(
            arm.name,
            quality=estimate(quality.mean(axis=1)),
            steps=estimate(steps.mean(axis=1)),
            deviation=float(np.mean(spread)),
            savings=estimate(1 - steps.mean(axis=1) / self.kept.steps),
            to_full=estimate((quality - full).mean(axis=1)),
            to_curve=self.to_curve(arm, range(1, self.kept.steps + 1)),
        )

    def difference(self, arm: Arm, other: Arm) -> Estimate:
        """Return the quality of an arm less that of another, paired by query."""
        return estimate(self._means(self.kept.at(arm.steps) - self.kept.at(other.steps)).mean(axis=1))

    def queries_needed(self, arm: Arm, other: Arm) -> int:
        """Return how many test queries tell a lead of `EFFECT` from none, from the spread of the paired differences over queries."""
        differences = self.kept.at(arm.steps) - self.kept.at(other.steps)
        spread = np.mean([own[test].std() for own, test in zip(differences, self.splits.test, strict=True)])
        return math.ceil((_POWER * float(spread) / EFFECT) ** 2)

    def to_curve(self, arm: Arm, points: range | tuple[int, ...]) -> Estimate:
        """Return the quality of an arm less that of the curve through fixed K at its mean k*, split by split."""
        steps, quality = self._means(arm.steps.astype(float)), self._means(self.kept.at(arm.steps))
        places = np.asarray(points, dtype=float)
        fixed = self._curve[:, :, [k - 1 for k in points]]
        read = [interpolated(fixed[:, split], places, steps[:, split]) for split in range(len(self.splits))]
        return estimate((quality - np.stack(read, axis=1)).mean(axis=1))

    @cached_property
    def curve(self) -> list[Estimate]:
        """Quality at fixed K = 1, 2, ... on the test queries."""
        return [estimate(self._curve[:, :, k].mean(axis=1)) for k in range(self.kept.steps)]

    @cached_property
    def _curve(self) -> Float[np.ndarray, "draws splits steps"]:
        every = self.kept.quality.T[:, None]
        return np.stack([self._means(np.broadcast_to(own, self.splits.test.shape)) for own in every], axis=-1)

    def _means(self, values: Float[np.ndarray, "splits queries"]) -> Float[np.ndarray, "draws splits"]:
        return self.bootstrap.means(values, self.splits.test)

    def fixed(self, name: str, steps: Sequence[int]) -> Arm:
        """Return the arm that does the same number of steps for every query; one number for each split."""
        return Arm(name, np.repeat(np.asarray(steps)[:, None], self.splits.test.shape[1], axis=1))

    def halted(self, name: str, rules: Sequence[ConvergeStop | FixedSteps]) -> Arm:
        """Return the arm of one rule for each split."""
        return Arm(name, np.stack([halting_steps(self.kept.development.stability, rule) for rule in rules]), tuple(rules))

    def full(self) -> Arm:
        """Refine to the end."""
        return self.fixed(f"fixed K = {self.kept.steps}", [self.kept.steps] * len(self.splits))

    def developed(self) -> Arm:
        """Return the smallest fixed K whose development quality is within half a point of the best."""
        means = [self.kept.quality[own].mean(axis=0) for own in self._development()]
        return self.fixed("fixed K, chosen on development", [int((mean >= mean.max() - _EPSILON).argmax()) + 1 for mean in means])

    def percentile(self, patience: int = 2) -> Arm:
        """Choose by the paper's percentile; needs judgements."""
        rules = [by_percentile(self.kept.development.select(own), epsilon=_EPSILON, patience=patience).rule for own in self._development()]
        return self.halted(f"ConvergeStop M = {patience}, percentile", rules)

    def certified(self, *, seed: int) -> Arm:
        """Choose by certificate: nDCG@10 where there are judgements, Jaccard@10 otherwise."""
        loss: Loss = "jaccard" if self.kept.development.ndcg is None else "ndcg"
        rules = [
            by_certificate(self.kept.development.select(own), loss=loss, epsilon=_BOUNDS[loss], seed=seed).rule
            for own in self._development()
        ]
        return self.halted("ConvergeStop M = 2, certified", rules)

    def budget(self, arm: Arm) -> Arm:
        """Return the fixed K of the same cost on the test queries, round(mean k*) as in the paper."""
        means = [float(own[test].mean()) for own, test in zip(arm.steps, self.splits.test, strict=True)]
        return self.fixed("fixed K = round(mean k*)", [max(1, round(mean)) for mean in means])

    def quantile(self, arm: Arm) -> Arm:
        """Return the fixed K under which 90 % of the development queries would have halted."""
        values = [np.quantile(own[~test], 0.9) for own, test in zip(arm.steps, self.splits.test, strict=True)]
        return self.fixed("fixed K = 90 % quantile of k*", [math.ceil(value) for value in values])

    def _development(self) -> list[Int[np.ndarray, "kept"]]:
        return [np.flatnonzero(~test) for test in self.splits.test]
