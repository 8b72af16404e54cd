"""Law 5: fixed steps are a threshold that cannot be met, and a lower threshold never costs more steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import doubles
from genembed import ConvergeStop, FixedSteps, Pooling
from genembed.engine import Engine
from genembed.halting import HaltingRule

STATES = st.integers(0, 2**31).map(lambda seed: torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
RULES = st.builds(
    ConvergeStop, st.floats(-0.9, 0.999), patience=st.integers(1, 3), min_steps=st.integers(1, 4), max_steps=st.integers(4, 8)
)


def trajectory_of(states: torch.Tensor, rule: HaltingRule) -> tuple[torch.Tensor, int]:
    """Pool states one by one until the rule stops; return z_0 .. z_8 and k*."""
    pooling = Pooling()
    first = states[:1]
    progress = pooling.start(torch.zeros(1, dtype=torch.long), first, first, window=rule.window)
    trajectory, halted = [progress.embedding[0]], None
    for state in states:
        progress, _ = pooling.advance(progress, state[None])
        trajectory.append(progress.embedding[0])
        if halted is None and bool(rule(progress)):
            halted = int(progress.step)
    assert halted is not None
    return torch.stack(trajectory), halted


@given(STATES, RULES)
@examples(max_examples=100)
def test_a_text_halts_at_the_step_of_equation_2(states: torch.Tensor, rule: ConvergeStop) -> None:
    trajectory, halted = trajectory_of(states, rule)
    assert halted == doubles.halting_step(trajectory, rule, 0)


@given(STATES, RULES, st.floats(-0.9, 0.999))
@examples(max_examples=100)
def test_a_lower_threshold_never_means_more_steps(states: torch.Tensor, rule: ConvergeStop, other: float) -> None:
    assume(other < rule.threshold)
    lower = ConvergeStop(other, patience=rule.patience, min_steps=rule.min_steps, max_steps=rule.max_steps)
    assert trajectory_of(states, lower)[1] <= trajectory_of(states, rule)[1]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_fixed_steps_equal_a_threshold_that_cannot_be_met(steps: int) -> None:
    engine, prompts = Engine(doubles.backbone("qwen2")), doubles.prompts([4, 9])

    def run(rule: HaltingRule) -> dict[int, tuple[int, list[float]]]:
        refined = list(engine.run(prompts, rule))
        return {int(i): (int(k), v.tolist()) for batch in refined for i, k, v in zip(batch.index, batch.steps, batch.vectors, strict=True)}

    never = run(ConvergeStop(1.5, max_steps=steps))
    assert never == run(FixedSteps(steps))
    assert {count for count, _ in never.values()} == {steps}
