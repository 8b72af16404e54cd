"""Numbers with an interval: a paired bootstrap over queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

LEVEL = 0.95
"""Share of the resamples that an interval holds."""
DRAWS = 2_000
"""Resamples."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """Return it in another unit; `factor` is positive."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """How often each query counts in each resample; the first row counts every query once and gives the estimate itself.

    All quantities of one analysis share the resamples, so that differences are paired.
    """

    counts: Float[np.ndarray, "draws queries"]
    """Whole numbers, as floats: a product of integers takes no fast path."""

    @classmethod
    def of(cls, queries: int, *, seed: int, draws: int = DRAWS) -> Bootstrap:
        """Draw the resamples: n queries out of n, with replacement.

        Args:
            queries: n.
            seed: Of the draws.
            draws: Number of resamples; the queries as they are stand before them.
        """
        drawn = np.random.default_rng(seed).multinomial(queries, np.full(queries, 1 / queries), size=draws)
        return cls(np.vstack([np.ones((1, queries)), drawn]))

    def means(
        self, values: Float[np.ndarray, "*splits queries"], among: Bool[np.ndarray, "*splits queries"] | None = None
    ) -> Float[np.ndarray, "draws *splits"]:
        """Return the mean of the values in every resample, over the queries `among` alone if given.

        A resample that holds none of those queries gives NaN, which `estimate` leaves out.
        """
        mask = np.ones(values.shape, dtype=bool) if among is None else among
        with np.errstate(invalid="ignore"):
            # A value outside the mask may be NaN, and 0 * NaN is NaN.
            result: np.ndarray = (self.counts @ np.where(mask, values, 0.0).T) / (self.counts @ mask.T.astype(float))
        return result


def estimate(draws: Float[np.ndarray, "draws"]) -> Estimate:
    """Return the first draw with the percentile interval of the others."""
    low, high = np.nanquantile(draws[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(draws[0]), float(low), float(high))


def interpolated(
    curve: Float[np.ndarray, "draws points"], places: Float[np.ndarray, "points"], at: Float[np.ndarray, "draws"]
) -> Float[np.ndarray, "draws"]:
    """Read each resample's curve at a place of its own, linearly between the points.

    Args:
        curve: Mean quality at each point.
        places: K of each point, rising.
        at: Mean k*.
    """
    right = np.clip(np.searchsorted(places, at, side="left"), 1, len(places) - 1)
    share = np.clip((at - places[right - 1]) / (places[right] - places[right - 1]), 0.0, 1.0)
    rows = np.arange(len(curve))
    return np.asarray((1 - share) * curve[rows, right - 1] + share * curve[rows, right])
