"""What a model says: the soft token's own shares, named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import doubles
from genembed import ConfigurationError, Embedder, FixedSteps, cli
from genembed.refine import refine
from genembed.spoken import Spoken, new_tokens, spoken_tokens
from genembed.tokens import TokenBatch


@pytest.mark.parametrize("family", ["qwen2", "llama", "bert"])
def test_the_shares_are_those_of_the_soft_token(family: str, embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of(family)
    said = spoken_tokens(embedder, "business trips", steps=3, top=10_000)
    assert len(said) == 3
    for best in said:
        shares = [word.probability for word in best]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_all_of_a_soft_token_is_what_is_fed_back(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("qwen2")
    backbone = embedder.backbone
    batch = TokenBatch.pad(embedder.tokenizer(["business trips"]).ids, device=backbone.device)
    with torch.no_grad():
        trajectory = refine(backbone, batch, steps=2)
    assert embedder.refine(["business trips"], halt=FixedSteps(2)).vectors[0] == pytest.approx(trajectory[0, -1].numpy(), abs=1e-6)
    said = spoken_tokens(embedder, "business trips", steps=1, top=doubles.VOCAB)[0]
    names = embedder.tokenizer.tokenizer.convert_tokens_to_ids
    ids = [names(word.token.replace(" ", "\u0120").replace("\\n", "\u010a")) for word in said]
    average = sum(word.probability * backbone.table[place] for word, place in zip(said, ids, strict=True))
    rows_state = backbone.forward(backbone.embed(batch.input_ids), positions=batch.positions, mask=batch.mask, cache=None, generated=False)
    expected = backbone.next_embeddings(rows_state[:, -1])[0]
    torch.testing.assert_close(average, expected, atol=1e-5, rtol=1e-4)


def test_an_instruction_changes_what_is_said(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("llama")
    bare = spoken_tokens(embedder, "business trips", steps=2)
    assert bare != spoken_tokens(embedder, "business trips", instruction="Find similar texts.", steps=2)
    assert bare == spoken_tokens(embedder, "business trips", steps=2)


def test_a_temperature_flattens_the_shares(folder_of: Callable[[str], Path], embedder_of: Callable[..., Embedder]) -> None:
    settings = embedder_of("qwen2").settings
    warm = embedder_of("qwen2", replace(settings, temperature=8.0))
    assert spoken_tokens(warm, "a", steps=1)[0][0].probability < spoken_tokens(embedder_of("qwen2"), "a", steps=1)[0][0].probability


def test_new_tokens_are_those_not_said_in_an_earlier_phase() -> None:
    words = {1: "a b", 2: "b c", 6: "a d", 11: "d e", 12: "e f"}
    said = [[Spoken(token, 0.5) for token in words.get(k, "a").split()] for k in range(1, 13)]
    assert new_tokens(said) == [(1, 5, ["a", "b", "c"]), (6, 10, ["d"]), (11, 12, ["e", "f"])]
    assert new_tokens(said[:3]) == [(1, 3, ["a", "b", "c"])]


@pytest.mark.parametrize(("steps", "top"), [(0, 5), (3, 0)])
def test_numbers_without_a_meaning_are_refused(embedder_of: Callable[..., Embedder], steps: int, top: int) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        spoken_tokens(embedder_of("qwen2"), "a", steps=steps, top=top)


def test_a_model_that_generates_nothing_says_nothing(embedder_of: Callable[..., Embedder]) -> None:
    with pytest.raises(ConfigurationError):
        spoken_tokens(embedder_of("qwen2", "bidirectional-avg"), "a", steps=1)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tokens", *arguments])
    return int(stopped.value.code or 0)


def test_the_command_shows_steps_and_phases(folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder_of("bert")), "business trips", "--steps", "7", "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:7]] == [str(k) for k in range(1, 8)]
    assert [line.split(":")[0] for line in lines[7:]] == ["new in steps 1-5", "new in steps 6-7"]


def test_before_and_after_training_stand_side_by_side(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = doubles.save_adapter(folder_of("qwen2"), tmp_path / "adapter")
    assert run(str(adapter), "business trips", "--steps", "2", "--before", "--json", "--preset", "gircse") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["trained"] != value["before_training"]


def test_without_an_adapter_there_is_no_before(folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder_of("qwen2")), "a", "--before") == 2
    assert "has no adapter" in capsys.readouterr().err
