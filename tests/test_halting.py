"""Halting rules: values, what they refuse, and how they are written to a settings file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genembed import ConfigurationError, ConvergeStop, FixedSteps, HaltingRule, Progress
from genembed.halting import rule_from_json, rule_to_json


def progress(steps: list[int], similarity: list[list[float]]) -> Progress:
    rows = len(steps)
    zeros = torch.zeros(rows, 2, dtype=torch.float64)
    return Progress(
        torch.arange(rows), torch.tensor(steps), zeros, zeros[:, 0], zeros, torch.tensor(similarity, dtype=torch.float64).reshape(rows, -1)
    )


def test_a_text_halts_after_patience_stable_steps_and_not_before() -> None:
    rule = ConvergeStop(0.9, patience=2)
    similarity = [[0.95, 0.95], [0.85, 0.95], [0.95, 0.85], [-1.0, 0.95], [0.9, 0.9]]
    assert rule(progress([3] * 5, similarity)).tolist() == [True, False, False, False, True]


def test_no_text_halts_before_min_steps_and_every_text_halts_at_max_steps() -> None:
    rule = ConvergeStop(0.9, patience=1, min_steps=4, max_steps=6)
    assert rule(progress([3, 4, 5, 6, 7], [[0.99], [0.99], [0.1], [0.1], [0.1]])).tolist() == [False, True, False, True, True]


def test_a_cosine_that_is_not_measured_yet_never_counts_as_stable() -> None:
    assert ConvergeStop(-0.999, patience=1)(progress([1], [[-1.0]])).tolist() == [False]


def test_only_the_newest_cosines_are_read() -> None:
    assert ConvergeStop(0.9, patience=1)(progress([5], [[0.1, 0.1, 0.95]])).tolist() == [True]


def test_a_cosine_that_is_not_a_number_never_counts_as_stable() -> None:
    assert ConvergeStop(0.9, patience=1)(progress([5], [[float("nan")]])).tolist() == [False]


def test_fixed_steps_halt_at_their_step_whatever_the_cosine() -> None:
    assert FixedSteps(3)(progress([0, 2, 3, 4], [[]] * 4)).tolist() == [False, False, True, True]
    assert FixedSteps(0)(progress([0], [[]])).tolist() == [True]


def test_a_rule_prints_as_it_is_made_and_compares_by_value() -> None:
    assert repr(ConvergeStop(threshold=0.998)) == "ConvergeStop(threshold=0.998, patience=2, min_steps=1, max_steps=20)"
    assert repr(FixedSteps(20)) == "FixedSteps(steps=20)"
    assert ConvergeStop(0.998) == ConvergeStop(threshold=0.998)
    assert len({FixedSteps(2), FixedSteps(2), FixedSteps(3)}) == 2


@pytest.mark.parametrize("rule", [FixedSteps(2), ConvergeStop(0.9)])
def test_both_rules_are_halting_rules(rule: object) -> None:
    assert isinstance(rule, HaltingRule)


def test_the_window_of_a_rule_is_what_it_reads() -> None:
    assert (FixedSteps(5).window, ConvergeStop(0.9, patience=3).window) == (0, 3)
    assert (FixedSteps(5).max_steps, ConvergeStop(0.9, max_steps=7).max_steps) == (5, 7)


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("steps", [-1, 2.0, True, "3", None])
def test_fixed_steps_refuse_what_is_not_a_count(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"FixedSteps\(steps=.*must be an integer of at least 0"):
        FixedSteps(steps)


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("threshold", [-1.0, -2, float("nan"), "0.9", None])
def test_a_threshold_that_is_no_cosine_is_refused_with_an_example(threshold: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"threshold=.*a cosine above -1 is needed, for example 0\.998"):
        ConvergeStop(threshold)


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("field", ["patience", "min_steps", "max_steps"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_counts_below_one_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{field}={value!r}: an integer of at least 1 is needed"):
        ConvergeStop(0.9, **{field: value})


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="min_steps=9 is above max_steps=5"):
        ConvergeStop(0.9, min_steps=9, max_steps=5)


@pytest.mark.parametrize("rule", [FixedSteps(0), FixedSteps(7), ConvergeStop(0.9, patience=3, min_steps=2, max_steps=9)])
def test_a_rule_survives_the_settings_file(rule: FixedSteps | ConvergeStop) -> None:
    assert rule_from_json(rule_to_json(rule)) == rule


@pytest.mark.usefixtures("untyped_caller")
def test_unknown_rules_and_fields_are_refused_with_what_is_known() -> None:
    with pytest.raises(ConfigurationError, match=r"halting rule 'Never' is unknown; known rules: FixedSteps, ConvergeStop"):
        rule_from_json({"rule": "Never"})
    with pytest.raises(ConfigurationError, match=r"halting rule FixedSteps:.*speed"):
        rule_from_json({"rule": "FixedSteps", "speed": 3})
    with pytest.raises(ConfigurationError, match="halting rule 'None' is unknown"):
        rule_from_json({})


def test_select_and_extend_carry_every_field_of_a_row() -> None:
    made = Progress(
        index=torch.tensor([4, 5, 6]),
        step=torch.tensor([1, 2, 3]),
        total=torch.tensor([[1.0], [2.0], [3.0]]),
        weight=torch.tensor([1.0, 2.0, 3.0]),
        embedding=torch.tensor([[7.0], [8.0], [9.0]]),
        similarity=torch.tensor([[0.1], [0.2], [0.3]]),
    )
    again = made.select(torch.tensor([2])).extend(made.select(torch.tensor([1, 0])))
    assert len(again) == 3
    for name in ("index", "step", "total", "weight", "embedding", "similarity"):
        assert torch.equal(getattr(again, name), getattr(made, name).flip(0)), name
