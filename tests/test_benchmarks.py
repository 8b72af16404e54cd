"""The arithmetic of the benchmarks of speed: ceilings, savings, regressions. What they time is not tested."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture
def roofline() -> Any:
    return importlib.import_module("roofline")


@pytest.fixture
def throughput() -> Any:
    return importlib.import_module("throughput")


def ceiling(roofline: Any, *, tied: bool = True, operations: float = 1e9, bandwidth: float = 1e9) -> Any:
    """One layer without attention worth counting: 1,000 weights in the body, a vocabulary of 100 by 10."""
    shape = roofline.Shape(layers=1, hidden=10, attention=0, keys=10, vocabulary=100, body=1_000, parameters=2_000)
    return roofline.Ceiling(shape=shape, rates=roofline.Rates({"float32": operations}, bandwidth), tied=tied)


def test_one_row_is_bound_by_reading_the_weights_and_many_by_arithmetic(roofline: Any) -> None:
    slow_memory = ceiling(roofline, bandwidth=1e6)
    assert slow_memory.step(0, rows=1) == pytest.approx(4 * (1_000 + 1_000) / 1e6)
    slow_arithmetic = ceiling(roofline, operations=1e6)
    assert slow_arithmetic.step(0, rows=64) == pytest.approx(64 * (2 * 1_000 + 4 * 1_000) / 1e6)


def test_keys_and_values_are_read_by_every_row(roofline: Any) -> None:
    one = ceiling(roofline, bandwidth=1e6)
    assert one.step(50, rows=3) - one.step(0, rows=3) == pytest.approx(4 * 3 * 50 * 2 * 10 / 1e6)


def test_untied_tables_are_both_read(roofline: Any) -> None:
    assert ceiling(roofline, tied=False, bandwidth=1e6).soft_token(1) == pytest.approx(2 * ceiling(roofline, bandwidth=1e6).soft_token(1))


def test_a_text_takes_its_share_of_the_prompts_and_of_every_step(roofline: Any) -> None:
    one = ceiling(roofline)
    assert one.text(20, 5, rows=4) == pytest.approx((one.prefill(20, 4) + 5 * one.step(20, 4)) / 4)


def test_a_saving_is_measured_beyond_the_reading_of_prompts(throughput: Any) -> None:
    found = throughput.saving(0.5, halted=6.0, full=10.0, unit=2.0)
    assert (found["decode"], found["share"], found["wall_clock"], found["ceiling"]) == pytest.approx((0.5, 1.0, 0.4, 0.4))


def comparison(**ratios: float) -> dict[str, Any]:
    variants = {name.replace("_", " "): {"to_causal_eos": ratio} for name, ratio in ratios.items()}
    return {"model": "mini", "kind": "queries", "variants": variants}


def test_a_ratio_that_rose_by_more_than_15_percent_is_a_regression_of_the_engine_alone(throughput: Any) -> None:
    before = {"comparisons": [comparison(engine=4.0, engine_near_9=2.0, plain=9.0)]}
    now = [comparison(engine=4.7, engine_near_9=2.2, plain=20.0, engine_new=9.0)]
    assert throughput.regressions(now, before) == ["mini queries, engine: 4.70 of one pass, was 4.00"]
    assert throughput.regressions([{**now[0], "kind": "documents"}], before) == []


def test_the_rows_of_a_batch_are_read_off_the_name(throughput: Any) -> None:
    names = ("engine, 32 rows", "plain", "engine", "engine near 9")
    assert [throughput._rows_of(name, 100) for name in names] == [32, 32, 100, 100]


def test_the_interval_of_a_median_is_that_of_its_order_statistics() -> None:
    summary = importlib.import_module("profitability").summary
    # Of 15 values the 4th and the 12th hold the median with 96 %, the 5th and the 11th with 88 %.
    assert summary(np.arange(1.0, 16.0)) == {"median": 8.0, "low": 4.0, "high": 12.0}
    assert summary(np.array([2.0, 1.0, 3.0])) == {"median": 2.0, "low": 1.0, "high": 3.0}
