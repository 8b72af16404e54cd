"""Law 1: the engine gives what the reference loop gives, whatever the batch, the order, the rule and the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import doubles
from genembed import Budget, ConvergeStop, FixedSteps, Pooling
from genembed.backbone import Backbone
from genembed.engine import Engine
from genembed.graphs import RowsCache
from genembed.packed import PackedRows
from genembed.refine import refine
from genembed.tokens import TokenBatch, TokenIds

MAX_STEPS = 7


@pytest.fixture(autouse=True)
def recorded_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record a step when it is done for the second time, so that few steps are enough to test it."""
    monkeypatch.setattr("genembed.graphs.WARM_UP", 1)


Rule = FixedSteps | ConvergeStop | doubles.Schedule

POOLINGS = {
    "generated": Pooling(),
    "laser": Pooling(pool_prompt_state=True),
    "mean": Pooling(kind="mean", prompt_weight=0.5),
    "last": Pooling(kind="last"),
}

POOLS = {
    "mixed": doubles.prompts([1, 1, 2, 3, 5, 8, 8, 8, 13, 21, 21, 34]),
    "shared": doubles.prompts([1, 1, 2, 3, 5, 8, 8, 8, 13, 21], shared=9, seed=1),
}
"""Prompts that share nothing, and prompts that all begin with the same nine tokens."""


@cache
def backbone_of(family: str, pooling: str) -> Backbone:
    return doubles.backbone(family, pooling=POOLINGS[pooling])


@cache
def alone(family: str, pooling: str, pool: str, place: int) -> torch.Tensor:
    return doubles.alone(backbone_of(family, pooling), POOLS[pool][place], MAX_STEPS)


def assert_engine_is_refine(family: str, pooling: str, pool: str, chosen: Sequence[int], rule: Rule, budget: Budget) -> None:
    prompts: list[TokenIds] = [POOLS[pool][place] for place in chosen]
    seen = []
    rule = replace(rule, first_row=100) if isinstance(rule, doubles.Schedule) else rule
    engine = Engine(backbone_of(family, pooling), budget)
    if budget.record_steps:
        engine.kept = RowsCache(engine.backbone, record=doubles.Replayed)
    for refined in engine.run(prompts, rule, keep_trajectory=True, first_row=100):
        for place, index in enumerate(refined.index):
            row = int(index) - 100
            expected = alone(family, pooling, pool, chosen[row])
            steps = doubles.halting_step(expected, rule, row)
            assert refined.steps[place] == steps
            np.testing.assert_allclose(refined.vectors[place], expected[steps], atol=2e-7)
            np.testing.assert_allclose(refined.trajectory[place, :steps], expected[1 : steps + 1], atol=2e-7)
            cosines = (expected[1:steps] * expected[2 : steps + 1]).sum(-1)
            np.testing.assert_allclose(refined.stability[place, : max(steps - 1, 0)], cosines, atol=2e-7)
            assert np.isnan(refined.trajectory[place, steps:]).all()
            assert np.isnan(refined.stability[place, max(steps - 1, 0) :]).all()
            seen.append(row)
    assert sorted(seen) == list(range(len(chosen)))


@st.composite
def cases(draw: st.DrawFn, pool: str) -> tuple[str, list[int], Rule, Budget]:
    pooling = draw(st.sampled_from(list(POOLINGS)))
    chosen = draw(st.lists(st.integers(0, len(POOLS[pool]) - 1), min_size=1, max_size=9))
    fewest = int(POOLINGS[pooling].needs_steps)
    counts = st.integers(fewest, MAX_STEPS)
    rule: Rule = draw(
        st.one_of(
            st.builds(FixedSteps, counts),
            st.lists(counts, min_size=len(chosen), max_size=len(chosen)).map(lambda steps: doubles.Schedule(tuple(steps))),
            st.builds(
                ConvergeStop,
                st.floats(0.5, 0.999),
                patience=st.integers(1, 3),
                min_steps=st.integers(1, 3),
                max_steps=st.integers(3, MAX_STEPS),
            ),
        )
    )
    budget = Budget(
        batch_tokens=draw(st.integers(1, 250)),
        max_rows=draw(st.integers(1, 6)),
        prefill_tokens=draw(st.integers(1, 60)),
        length_ratio=draw(st.sampled_from([1.0, 1.5, 4.0, 50.0])),
        min_prefix=draw(st.sampled_from([1, 4, 30])),
        check_every=draw(st.sampled_from([1, 2, 3, 5])),
        record_steps=draw(st.booleans()),
        native=draw(st.sampled_from([None, False])),
    )
    return pooling, chosen, rule, budget


@pytest.mark.parametrize("pool", list(POOLS))
@pytest.mark.parametrize("family", ["qwen2", "bert", "mistral-window", "gemma2"])
def test_the_engine_equals_the_reference_loop_for_any_batch_order_rule_and_budget(family: str, pool: str) -> None:
    @given(cases(pool))
    @examples(max_examples=20)
    def law(case: tuple[str, list[int], Rule, Budget]) -> None:
        pooling, chosen, rule, budget = case
        assert_engine_is_refine(family, pooling, pool, chosen, rule, budget)

    law()


BUSY = Budget(max_rows=4, prefill_tokens=30, length_ratio=50.0, min_prefix=1, record_steps=False)
"""A budget under which rows leave, are moved, and newcomers enter beside rows that are half done."""


@pytest.mark.parametrize("pool", list(POOLS))
@pytest.mark.parametrize("family", list(doubles.FAMILIES))
@pytest.mark.parametrize("way", ["native", "torch", "as on a gpu"])
def test_every_architecture_equals_the_reference_loop_when_rows_leave_and_enter(family: str, pool: str, way: str) -> None:
    chosen = list(range(len(POOLS[pool])))
    schedule = doubles.Schedule(tuple(1 + (5 * row) % MAX_STEPS for row in chosen))
    budget = replace(BUSY, record_steps=True, check_every=4) if way == "as on a gpu" else replace(BUSY, native=way == "native")
    assert_engine_is_refine(family, "generated", pool, chosen, schedule, budget)
    assert_engine_is_refine(family, "mean", pool, chosen[::-1], ConvergeStop(0.97, patience=1, max_steps=MAX_STEPS), budget)


def test_the_busy_budget_compacts_admits_newcomers_and_shares_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the tests above against a budget that never does what they claim to test."""
    seen: Counter[str] = Counter()
    select, admit, share = PackedRows.select, PackedRows.admit, PackedRows.share

    def spy_select(self: PackedRows, keep: torch.Tensor) -> None:
        seen["moved"] += int((keep != torch.arange(len(keep))).sum())
        select(self, keep)

    def spy_admit(self: PackedRows, prompts: Sequence[TokenIds]) -> None:
        seen["newcomers beside older rows"] += int(len(self) > 0)
        admit(self, prompts)

    def spy_share(self: PackedRows, prefix: TokenIds) -> object:
        seen["shared tokens"] = len(prefix)
        return share(self, prefix)

    monkeypatch.setattr(PackedRows, "select", spy_select)
    monkeypatch.setattr(PackedRows, "admit", spy_admit)
    monkeypatch.setattr(PackedRows, "share", spy_share)
    chosen = list(range(len(POOLS["shared"])))
    schedule = doubles.Schedule(tuple(1 + (5 * row) % MAX_STEPS for row in chosen))
    assert_engine_is_refine("qwen2", "generated", "shared", chosen, schedule, BUSY)
    assert seen["shared tokens"] == 9
    assert seen["moved"] >= 3
    assert seen["newcomers beside older rows"] >= 2


def test_prefix_attention_has_no_sliding_window_in_either_loop() -> None:
    """The engine's steps applied the layers' window, the reference's masks did not."""
    backbone = doubles.backbone("mistral-window", attention="prefix")
    prompts = doubles.prompts([19, 12, 4])
    vectors = {
        int(row): vector
        for done in Engine(backbone).run(prompts, FixedSteps(4))
        for row, vector in zip(done.index, done.vectors, strict=True)
    }
    for row, ids in enumerate(prompts):
        with torch.no_grad():
            expected = refine(backbone, TokenBatch.pad([ids]), steps=4)[0, -1]
        torch.testing.assert_close(torch.from_numpy(vectors[row]).double(), expected, rtol=0, atol=2e-7)


def test_a_shared_prefix_does_not_overflow_half_precision() -> None:
    """Queries were multiplied by keys before they were scaled."""
    from genembed.attention import attend

    large = torch.full((1, 2, 3, 128), 40.0, dtype=torch.float16)
    assert attend(large, large, large, None, None, softcap=50.0).isfinite().all()
