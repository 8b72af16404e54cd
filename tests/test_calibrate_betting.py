"""The test behind a certificate: right by its formula, honest over many worlds, and clear about what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genembed import ConfigurationError
from genembed.calibrate.betting import SIGNED, UNIT, LossRange, Monitor, certified, queries_needed, wealth


def slow_wealth(losses: list[float], *, epsilon: float, delta: float, within: LossRange) -> list[float]:
    """The test as its formula says it, one loss after another."""
    n, path, now = len(losses), [], 1.0
    seen, squares, variance = within.prior_mean, within.prior_variance, within.prior_variance
    for i, loss in enumerate(losses, start=1):
        bet = min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), within.largest_bet / (1 - epsilon))
        now *= 1 - bet * (loss - epsilon)
        path.append(now)
        seen += loss
        squares += (loss - seen / (i + 1)) ** 2
        variance = squares / (i + 1)
    return path


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_the_wealth_is_that_of_its_formula(losses: list[float], epsilon: float, delta: float) -> None:
    for within in (SIGNED, UNIT):
        values = [max(loss, within.low) for loss in losses]
        made = wealth(np.asarray(values)[:, None], epsilon=epsilon, delta=delta, within=within)[:, 0]
        np.testing.assert_allclose(made, slow_wealth(values, epsilon=epsilon, delta=delta, within=within), rtol=1e-9)
        assert (made > 0).all()


@given(st.floats(0.01, 0.5), st.sampled_from([SIGNED, UNIT]))
def test_losses_at_the_bound_earn_nothing(epsilon: float, within: LossRange) -> None:
    assert wealth(np.full((50, 1), epsilon), epsilon=epsilon, delta=0.1, within=within) == pytest.approx(1.0)


@pytest.mark.parametrize(("within", "epsilon", "queries"), [(UNIT, 0.05, 200), (SIGNED, 0.02, 2_000)])
def test_a_risk_at_the_bound_is_rejected_no_more_often_than_promised(within: LossRange, epsilon: float, queries: int) -> None:
    rng, worlds = np.random.default_rng(0), 1_000
    losses = (rng.random((queries, worlds)) < 2 * epsilon) * 0.5  # a mean of exactly epsilon
    rejected = (wealth(losses, epsilon=epsilon, delta=0.1, within=within).max(axis=0) >= 10).mean()
    assert 0 < rejected <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / worlds)


def test_the_chain_ends_at_the_first_candidate_that_is_not_certified() -> None:
    safe, bold = np.zeros((400, 1)), np.full((400, 1), 0.2)
    assert certified(np.hstack([safe, safe, bold, safe]), epsilon=0.05, delta=0.1, within=UNIT) == 2
    assert certified(np.hstack([safe, safe]), epsilon=0.05, delta=0.1, within=UNIT) == 2
    assert certified(bold, epsilon=0.05, delta=0.1, within=UNIT) == 0


@pytest.mark.parametrize("queries", [0, 5])
def test_too_few_queries_certify_nothing(queries: int) -> None:
    assert certified(np.zeros((queries, 3)), epsilon=0.02, delta=0.1, within=UNIT) == 0


def test_the_order_of_the_queries_is_the_seeds() -> None:
    losses = (np.random.default_rng(1).random((300, 1)) < 0.02) * 1.0
    again = losses[np.random.default_rng(3).permutation(len(losses))]
    paths = [wealth(values, epsilon=0.05, delta=0.1, within=UNIT).max() for values in (losses, again)]
    assert paths[0] != paths[1]
    # A bound between the two is certified in one order and not in the other.
    delta = float(np.sqrt(1 / np.prod(paths)))
    assert {certified(losses, epsilon=0.05, delta=delta, within=UNIT, seed=seed) for seed in range(20)} == {0, 1}
    assert len({certified(losses, epsilon=0.05, delta=delta, within=UNIT, seed=3) for _ in range(3)}) == 1


def test_thousands_of_good_queries_do_not_overflow() -> None:
    made = wealth(np.zeros((200_000, 1)), epsilon=0.5, delta=0.1, within=UNIT)
    assert np.isfinite(made).all()


def test_the_number_of_queries_that_would_do_is_named() -> None:
    rng = np.random.default_rng(0)
    losses = (rng.random(40) < 0.25) * (2 / 11)  # Jaccard losses of one changed result in ten
    needed = queries_needed(losses, epsilon=0.1, delta=0.1, within=UNIT)
    assert needed is not None
    assert 50 <= needed <= 200
    again = rng.choice(losses, size=(needed, 200))
    reached = wealth(again, epsilon=0.1, delta=0.1, within=UNIT).max(axis=0) >= 10
    assert reached.mean() > 0.7


@pytest.mark.parametrize("losses", [np.full(30, 0.1), np.zeros(0)])
def test_no_number_of_queries_certifies_a_risk_above_the_bound(losses: np.ndarray) -> None:
    assert queries_needed(losses, epsilon=0.1, delta=0.1, within=UNIT) is None


def test_the_monitor_rarely_cries_wolf_and_always_wakes() -> None:
    rng = np.random.default_rng(0)

    def alarms(risk: float, watched: int) -> float:
        raised = [Monitor(epsilon=0.05, delta=0.05, within=UNIT).update((rng.random(watched) < 2 * risk) * 0.5) for _ in range(150)]
        return float(np.mean(raised))

    assert alarms(0.05, 1_000) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    assert alarms(0.15, 1_000) > 0.99


def test_the_monitor_is_a_product_of_fair_bets_and_its_alarm_stays() -> None:
    monitor = Monitor(epsilon=0.02, delta=0.1, within=SIGNED)
    assert (monitor.wealth, monitor.alarm, monitor.seen) == (1.0, False, 0)
    assert monitor.update([0.4] * 60)
    highest = monitor.wealth
    assert highest >= 10
    assert monitor.update([-0.4] * 60)
    assert monitor.wealth < highest
    assert monitor.seen == 120


@given(st.lists(st.floats(-1, 1), max_size=50), st.floats(0.01, 0.5))
def test_the_monitors_wealth_stays_positive_whatever_comes(losses: list[float], epsilon: float) -> None:
    monitor = Monitor(epsilon=epsilon, within=SIGNED)
    monitor.update(losses)
    assert monitor.wealth > 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.5, -0.5])
def test_a_loss_outside_its_range_is_refused_with_its_place(loss: float) -> None:
    with pytest.raises(ConfigurationError, match=r"of query 1, candidate 0: outside \[0, 1\]"):
        wealth(np.asarray([[0.0], [loss]]), epsilon=0.1, delta=0.1, within=UNIT)
    with pytest.raises(ConfigurationError, match="outside"):
        Monitor(epsilon=0.1, within=UNIT).update([0.0, loss])


@pytest.mark.parametrize("change", [{"epsilon": 0.0}, {"epsilon": 1.0}, {"epsilon": -0.1}, {"delta": 0.0}, {"delta": 1.0}])
def test_a_bound_without_a_meaning_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        certified(np.zeros((9, 1)), **{"epsilon": 0.1, "delta": 0.1, "within": UNIT, **change})
