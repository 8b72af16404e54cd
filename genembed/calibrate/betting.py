"""Is the risk below a bound? A test by betting, which holds at any number of queries, and a monitor that watches it in production.

Losses are those of a rule that halts, against refining to the end: positive where halting loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from genembed.errors import ConfigurationError

_ROUNDING = 1e-9
"""By so much a computed loss may leave its range."""


@dataclass(frozen=True)
class LossRange:
    """What values a loss can take, and how the test bets on them."""

    low: float
    """Smallest possible loss; the largest is 1."""
    prior_mean: float
    """What is believed of the mean before the first query."""
    prior_variance: float
    """What is believed of the variance; it keeps the first bets small."""
    largest_bet: float
    """Share of the wealth that the worst possible loss may take, in (0, 1)."""

    def holds(self, loss: float) -> bool:
        """Whether a loss can occur; NaN cannot."""
        return self.low - _ROUNDING <= loss <= 1 + _ROUNDING


SIGNED = LossRange(low=-1.0, prior_mean=0.0, prior_variance=0.0025, largest_bet=0.5)
"""Of a loss that can be a gain: nDCG of the full refinement less that of the halted one."""

UNIT = LossRange(low=0.0, prior_mean=0.5, prior_variance=0.25, largest_bet=0.99)
"""Of a loss in [0, 1]: 1 - Jaccard of two result lists."""


def wealth(
    losses: Float[np.ndarray, "queries candidates"], *, epsilon: float, delta: float, within: LossRange
) -> Float[np.ndarray, "queries candidates"]:
    """Bet against "the risk is at least epsilon", one query after another.

        E_i = E_{i-1} (1 - nu_i (l_i - epsilon)),   E_0 = 1,   nu_i = min( sqrt(2 ln(1/delta) / (n v_{i-1})), c / (1 - epsilon) )
        mu_i = (m_0 + sum_{s<=i} l_s) / (i+1),      v_i = (v_0 + sum_{s<=i} (l_s - mu_s)^2) / (i+1)
                                                                            (Waudby-Smith and Ramdas 2024, predictable plug-in)

    While the risk is at least epsilon, E is a supermartingale: it ever reaches 1 / delta with probability at most delta. A bet is made
    before its loss is seen, so this holds for any losses in the range whose order says nothing.

    Args:
        losses: Of each query, in random order, under each candidate on its own; in [within.low, 1].
        epsilon: The bound, above `within.low` and below 1.
        delta: Chance of a false rejection, in (0, 1).
        within: The range of the loss.

    Returns:
        E_1 .. E_n of each candidate.

    Raises:
        ConfigurationError: If a loss is not finite or outside its range, or a setting has no meaning.
    """
    losses = np.asarray(losses, dtype=np.float64)
    check_bound(epsilon, delta, within)
    _check_losses(losses, within)
    place = np.arange(1, len(losses) + 1)[:, None]
    mean = (within.prior_mean + losses.cumsum(axis=0)) / (place + 1)
    variance = (within.prior_variance + ((losses - mean) ** 2).cumsum(axis=0)) / (place + 1)
    before = np.vstack([np.full((1, losses.shape[1]), within.prior_variance), variance])[:-1]
    bets = np.minimum(np.sqrt(2 * math.log(1 / delta) / (len(losses) * before)), within.largest_bet / (1 - epsilon))
    # In logarithms: thousands of queries multiply to more than a float holds.
    result: np.ndarray = np.exp(np.minimum(np.log1p(-bets * (losses - epsilon)).cumsum(axis=0), 700.0))
    return result


def certified(losses: Float[np.ndarray, "queries candidates"], *, epsilon: float, delta: float, within: LossRange, seed: int = 0) -> int:
    """Return how many candidates, counted from the safest, have a risk below epsilon.

        reject "risk_j >= epsilon" when max_i E_i^j >= 1 / delta;  stop at the first j that is not rejected
                                                                              (Learn then Test, fixed sequence: Angelopoulos et al. 2021)

    With probability at least 1 - delta every one of them has. The order of the candidates must have been fixed before any loss was seen;
    then their number costs nothing.

    Args:
        losses: Of each query under each candidate, safest candidate first.
        epsilon: The bound.
        delta: Chance that a candidate is certified falsely.
        within: The range of the loss.
        seed: Of the order in which the queries are read.
    """
    order = np.random.default_rng(seed).permutation(len(losses))
    if not len(order):
        return 0
    rejected = wealth(losses[order], epsilon=epsilon, delta=delta, within=within).max(axis=0) >= 1 / delta
    return int(rejected.argmin()) if not rejected.all() else len(rejected)


def queries_needed(
    losses: Float[np.ndarray, "queries"],
    *,
    epsilon: float,
    delta: float,
    within: LossRange,
    power: float = 0.8,
    most: int = 20_000,
    draws: int = 60,
    seed: int = 0,
) -> int | None:
    """Estimate how many queries would certify a candidate whose losses are distributed like these.

    Queries are drawn from the given ones with replacement; the number is the smallest of 50, 71, 100, 141, ... that certifies in a
    share `power` of the draws.

    Args:
        losses: Of the queries, in the range `within`.
        epsilon: The bound, in (0, 1).
        delta: Chance that the bound does not hold.
        within: Range of the losses.
        power: Share of the draws that must certify, in (0, 1].
        most: Queries beyond which none are tried.
        draws: Samples of each size.
        seed: Of the draws.

    Returns:
        The number; None if no number up to `most` would do, as where the mean loss is not below epsilon.
    """
    if not len(losses) or float(np.mean(losses)) >= epsilon:
        return None
    rng, count = np.random.default_rng(seed), 50.0
    while round(count) <= most:
        drawn = rng.choice(np.asarray(losses), size=(round(count), draws))
        reached = wealth(drawn, epsilon=epsilon, delta=delta, within=within).max(axis=0) >= 1 / delta
        if reached.mean() >= power:
            return round(count)
        count *= math.sqrt(2)
    return None


class Monitor:
    """Watches a certified rule in production: an alarm when its risk is no longer below the bound.

        M_t = prod_{s<=t} (1 + nu_s (l_s - epsilon)),   alarm when M_t >= 1 / delta

    While the risk is at most epsilon, the chance that the alarm is ever raised is at most delta, however long it watches (Ville 1939).
    Feed it the losses of a small share of the traffic, refined to the end in the shadow.

    Args:
        epsilon: The certified bound.
        delta: Chance of ever raising a false alarm.
        within: The range of the loss.
    """

    def __init__(self, *, epsilon: float, delta: float = 0.05, within: LossRange) -> None:
        check_bound(epsilon, delta, within)
        self.epsilon, self.delta, self.within = epsilon, delta, within
        self.seen = 0
        """Losses so far."""
        self._log_wealth = self._highest = 0.0
        self._sum, self._squares = 0.0, within.prior_variance

    @property
    def wealth(self) -> float:
        """M_t; 1 at the start."""
        return math.exp(min(self._log_wealth, 700.0))

    @property
    def alarm(self) -> bool:
        """Whether the bound has been found broken; once raised it stays."""
        return self._highest >= math.log(1 / self.delta)

    def update(self, losses: Iterable[float]) -> bool:
        """Take losses in the order in which they came; return whether there is an alarm.

        Raises:
            ConfigurationError: If a loss is not finite or outside its range; those before it are taken.
        """
        for loss in losses:
            if not self.within.holds(float(loss)):
                raise ConfigurationError(
                    f"loss {loss} after {self.seen} others: outside [{self.within.low:g}, 1], for which the test holds."
                )
            self._take(float(loss))
        return self.alarm

    def _take(self, loss: float) -> None:
        mean = (self.epsilon + self._sum) / (self.seen + 1)
        variance = self._squares / (self.seen + 1)
        # Bet as far as the losses so far were above the bound: nothing while they were below. Half of what the smallest loss could take.
        bet = max(0.0, min((mean - self.epsilon) / max(variance, 1e-12), 0.5 / (self.epsilon - self.within.low)))
        self._log_wealth += math.log1p(bet * (loss - self.epsilon))
        self._highest = max(self._highest, self._log_wealth)
        self._sum += loss
        self._squares += (loss - mean) ** 2
        self.seen += 1


def check_bound(epsilon: float, delta: float, within: LossRange) -> None:
    """Refuse a bound that nothing could break or keep.

    Raises:
        ConfigurationError: With the range.
    """
    if not max(within.low, 0.0) < epsilon < 1:
        raise ConfigurationError(f"epsilon={epsilon!r}: a loss in (0, 1) is needed, for example 0.02 for two points.")
    if not 0 < delta < 1:
        raise ConfigurationError(f"delta={delta!r}: a probability in (0, 1) is needed, for example 0.1.")


def _check_losses(losses: Float[np.ndarray, "queries candidates"], within: LossRange) -> None:
    bad = ~((losses >= within.low - _ROUNDING) & (losses <= 1 + _ROUNDING))
    if bad.any():
        row, candidate = (int(place[0]) for place in bad.nonzero())
        raise ConfigurationError(
            f"loss {losses[row, candidate]} of query {row}, candidate {candidate}: outside [{within.low:g}, 1], for which the test holds."
        )
