"""Model settings: the settings file, and every combination that is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

import doubles
from genembed import ConfigurationError, ConvergeStop, FixedSteps, ModelSettings, Pooling
from genembed.settings import BIDIRECTIONAL_AVG, CAUSAL_EOS, GIRCSE, HARD_TOKENS, LASER, PRESETS, preset_settings

OTHER = ModelSettings(
    attention="prefix",
    pooling=Pooling(kind="mean", prompt_weight=20.0),
    temperature=0.7,
    halt=ConvergeStop(0.9995, patience=3, min_steps=2, max_steps=9),
    template="{instruction} | {text} |",
    query_instruction="Find it",
    document_instruction="Keep it",
    special_tokens=(("[CLS]",), ("[SEP]", "[SEP]")),
    padding_side="right",
    max_length=77,
    adapter_positions="generated",
    parallel_passes=2,
    matryoshka_dims=(16, 24),
)
"""Differs from the defaults in every field but `tokens`."""


@pytest.mark.parametrize("settings", [*PRESETS.values(), OTHER, doubles.PREFIX], ids=lambda settings: settings.attention)
def test_settings_survive_the_settings_file(settings: ModelSettings) -> None:
    assert ModelSettings.from_json(json.loads(json.dumps(settings.to_json())), source="x") == settings


def test_every_setting_is_written() -> None:
    default = ModelSettings()
    assert {field.name for field in fields(OTHER) if getattr(OTHER, field.name) == getattr(default, field.name)} == {"tokens"}
    assert set(OTHER.to_json()) == {"format_version", *(field.name for field in fields(OTHER))}


def test_missing_fields_have_the_default() -> None:
    assert ModelSettings.from_json({"format_version": 1}, source="x") == ModelSettings()


def test_unknown_fields_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"a/genembed.json: unknown settings \['speed'\]; known: \['adapter_positions', "):
        ModelSettings.from_json({"format_version": 1, "speed": 3}, source="a/genembed.json")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_version_is_refused(version: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"f\.json: format_version .* is not 1; a newer genembed may read it"):
        ModelSettings.from_json({"format_version": version, "attention": "causal"}, source="f.json")


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize(
    "value",
    [
        {"pooling": {"kind": "mean", "speed": 1}},
        {"pooling": "mean"},
        {"pooling": None},
        {"halt": {"rule": "FixedSteps", "steps": -1}},
        {"halt": "FixedSteps"},
        {"halt": 20},
        {"special_tokens": [["[CLS]"]]},
        {"special_tokens": "yes"},
        {"special_tokens": 3},
        {"special_tokens": [1, 2]},
        {"temperature": "hot"},
        {"temperature": None},
        {"max_length": 3.5},
        {"max_length": "512"},
        {"max_length": 0},
        {"template": 3},
        {"template": "{text}"},
        {"attention": ["causal"]},
        {"query_instruction": 5},
        {"attention": "sideways"},
        {"matryoshka_dims": 64},
        {"matryoshka_dims": [64, 32]},
        {"matryoshka_dims": [0, 32]},
        {"matryoshka_dims": ["64"]},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_with_the_files_name(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^folder/genembed\.json: "):
        ModelSettings.from_json({"format_version": 1, **value}, source="folder/genembed.json")


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "full"}, "attention='full': choose one of causal, prefix, bidirectional"),
        ({"tokens": "medium"}, "tokens='medium': choose one of soft, hard"),
        ({"padding_side": "both"}, "padding_side='both': choose one of left, right"),
        ({"parallel_passes": -1}, "parallel_passes=-1: a whole number is needed; 0 refines step by step"),
        ({"parallel_passes": 1.5}, "parallel_passes=1.5: a whole number"),
        ({"parallel_passes": True}, "parallel_passes=True: a whole number"),
        (
            {"attention": "bidirectional", "pooling": Pooling(kind="mean"), "halt": FixedSteps(0), "parallel_passes": 2},
            "parallel_passes=2 has no effect: bidirectional attention generates nothing",
        ),
        ({"adapter_positions": "some"}, "adapter_positions='some': choose one of all, generated"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive; for the single likeliest token use tokens='hard'"),
        ({"max_length": 0}, "max_length=0: at least one token is needed"),
        ({"tokens": "hard", "temperature": 0.5}, "temperature has no effect with tokens='hard'"),
        (
            {"attention": "bidirectional"},
            r"halt=FixedSteps\(steps=20\): bidirectional attention cannot generate.*use FixedSteps\(0\), or attention='prefix'",
        ),
        (
            {"halt": FixedSteps(0)},
            "steps=0: this model pools generated states only, so at least one.*use pooling='last' or 'mean'",
        ),
        ({"attention": "bidirectional", "halt": FixedSteps(0)}, "pools generated states only"),
        ({"template": "{text}"}, "it must hold"),
    ],
)
def test_what_cannot_work_is_refused_with_value_reason_and_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModelSettings(**changes)


def test_a_one_pass_model_refuses_steps_asked_for_in_a_call() -> None:
    with pytest.raises(ConfigurationError, match=r"halt=ConvergeStop\(threshold=0.9, .*bidirectional attention cannot generate"):
        BIDIRECTIONAL_AVG.check_halt(ConvergeStop(0.9))
    CAUSAL_EOS.check_halt(FixedSteps(3))


def test_the_presets_are_the_published_families() -> None:
    assert list(PRESETS) == ["gircse", "laser", "causal-eos", "bidirectional-avg", "hard-tokens"]
    assert ModelSettings() == GIRCSE
    assert (GIRCSE.max_length, GIRCSE.halt, GIRCSE.special_tokens, GIRCSE.pooling) == (512, FixedSteps(20), ((), ()), Pooling())
    assert (LASER.halt, LASER.special_tokens, LASER.pooling.pool_prompt_state) == (FixedSteps(2), "tokenizer", True)
    assert (CAUSAL_EOS.pooling.kind, CAUSAL_EOS.halt) == ("last", FixedSteps(0))
    assert (BIDIRECTIONAL_AVG.pooling.kind, BIDIRECTIONAL_AVG.attention) == ("mean", "bidirectional")
    assert HARD_TOKENS.tokens == "hard"


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigurationError, match=r"preset='gpt' is unknown; choose one of gircse, laser, causal-eos, .* or pass a ModelSettings"
    ):
        preset_settings("gpt")
    assert preset_settings("laser") is LASER
    assert preset_settings(OTHER) is OTHER
