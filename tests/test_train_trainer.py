"""What the trainer makes of a batch, the weights it reads back, and how a head is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import doubles
import genembed
from genembed.errors import CheckpointError
from genembed.tokens import PromptTokenizer
from genembed.train import collate, head
from genembed.train.collate import PairCollator
from genembed.train.head import fit_head
from genembed.train.model import WEIGHTS, WEIGHTS_INDEX, TrainableEmbedder, build
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile, Pair
from genembed.train.recipe import Lora, Recipe
from genembed.train.trainer import StepwiseTrainer

RECIPE = Recipe(model="m", files=(DataFile(path="pairs.jsonl"),), updates=1, min_steps=2, max_steps=2, lora=Lora(rank=2, alpha=4))
TEXTS = ["a vector", "two business trips", "the claim is refuted", "fasting glucose", "a model stops", "stable"]


@pytest.fixture
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "models"


def pair(query: str, positive: str, *negatives: str) -> Pair:
    return Pair(query=query, positives=(positive,), negatives=negatives, instruction=None, source="file", symmetric=False, score=None)


# Right answers among the candidates


def loss(recipe: Recipe, folder: Path, pairs: Sequence[Pair]) -> float:
    """Return the loss of these pairs in one batch."""
    model = build(recipe, lambda _tokenizer: [])
    trainer = StepwiseTrainer(model, recipe, lambda *_: pytest.fail("no batch is loaded"), None, folder)
    batch = PairCollator(recipe, model.tokenizer, model.settings)(0, pairs)
    return trainer.compute_loss(model, {"batch": batch}).item()


@pytest.mark.parametrize(
    "pairs",
    [
        [pair("a query", "one answer"), pair("A query?", "another answer")],
        [pair("a query", "one answer"), pair("another query", "One answer!")],
        [pair("a query", "one answer", "(one answer)")],
        [pair("a query", "one answer that goes on", "one answer that is cut")],
        [pair("one query that goes on", "one answer"), pair("one query that is cut", "another answer")],
    ],
    ids=["the same query", "the same positive", "a copy of the positive", "the same positive as read", "the same query as read"],
)
def test_a_right_answer_is_no_negative(models: Path, tmp_path: Path, pairs: list[Pair]) -> None:
    """Where every other candidate is right, nothing is left to be contrasted with."""
    recipe = replace(
        RECIPE, model=str(doubles.saved("qwen2", models)), objective=Objective(temperature=1.0), query_tokens=9, passage_tokens=9
    )
    cut = PromptTokenizer(doubles.tokenizer(), replace(doubles.settings_of("qwen2"), max_length=9))
    same, other, short = (cut([text]).ids[0].tolist() for text in ("one answer that goes on", "one answer that is cut", "one answer"))
    assert same == other != short  # else the cases would not say what they mean to
    assert loss(recipe, tmp_path, pairs) == 0
    wrong = [*pairs, pair("business trips", "glucose")]
    assert loss(recipe, tmp_path, wrong) > 0


def test_a_prompt_tokenizer_is_made_once_for_each_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(PromptTokenizer):
        def __init__(self, tokenizer: object, settings: doubles.ModelSettings) -> None:
            made.append(settings.max_length)
            super().__init__(tokenizer, settings)

    monkeypatch.setattr(collate, "PromptTokenizer", Counted)
    settings = doubles.settings_of("qwen2")
    recipe = replace(RECIPE, length_limits=(8, 16), query_tokens=12, passage_tokens=32)
    collator = PairCollator(recipe, PromptTokenizer(doubles.tokenizer(), settings), settings)
    pairs = [pair("a query " * 20, "an answer " * 20), pair("another", "answer")]
    longest = {
        tuple(max(map(len, texts)) for texts in (batch.queries, batch.candidates)) for batch in (collator(n, pairs) for n in range(20))
    }
    assert longest == {(8, 8), (12, 16)}
    assert sorted(made) == [8, 12, 16]


# Weights


def test_weights_in_several_files_are_read_back(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, model=str(doubles.saved("llama", models)), lora=None)
    first, second = (build(recipe, lambda _tokenizer: []) for _ in range(2))
    with torch.no_grad():
        for weight in first.parameters():
            weight.add_(torch.randn_like(weight))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", _split(PreTrainedModel.save_pretrained))
    first.save(tmp_path, first.settings)
    assert (tmp_path / WEIGHTS_INDEX).is_file()
    assert not (tmp_path / WEIGHTS).exists()
    second.restore(tmp_path)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="its weights are not those of this run"):
        build(replace(recipe, model=str(doubles.saved("gpt2", models)), query_tokens=64, passage_tokens=64), lambda _: []).restore(tmp_path)


def _split(save: object) -> object:
    def save_in_parts(self: PreTrainedModel, *arguments: object, **options: object) -> None:
        save(self, *arguments, **{**options, "max_shard_size": "20KB"})  # type: ignore[operator]

    return save_in_parts


# The head of an encoder


def encoder(models: Path) -> TrainableEmbedder:
    base = models / "headless"
    if not base.is_dir():
        doubles.model("bert").bert.save_pretrained(base)  # type: ignore[union-attr]
        doubles.tokenizer().save_pretrained(base)
    settings = replace(doubles.PREFIX, adapter_positions="generated")
    recipe = replace(RECIPE, model=str(base), settings=settings, fit_head=6, query_tokens=64, passage_tokens=64)
    return build(replace(recipe, lora=Lora(rank=2, targets=r"bert\.encoder\..*query")), lambda _tokenizer: [])


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_head_starts_at_the_ridge_regression_of_all_states_however_they_are_cut(
    models: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    model = encoder(models)
    prompts = model.tokenizer(TEXTS).ids
    rarity = head._rarity(prompts, len(model.backbone.table))
    with torch.no_grad():
        states, topics = (
            torch.cat(part).double() for part in zip(*(head._states_and_topics(model, [ids], rarity) for ids in prompts), strict=True)
        )
    x = torch.cat([states, torch.ones(len(states), 1, dtype=states.dtype)], dim=1)
    expected = torch.linalg.solve(x.T @ x + 0.5 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (topics - topics.mean(0)))
    monkeypatch.setattr(head, "_ROWS", rows)
    fit_head(model, prompts, ridge=0.5)
    assert model.trained_head is not None
    torch.testing.assert_close(model.trained_head.dense.weight, expected[:-1].T.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.trained_head.dense.bias, expected[-1].float(), rtol=1e-4, atol=1e-5)


def test_the_cuts_a_model_is_trained_for_are_written_into_its_settings(models: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, model=str(doubles.saved("qwen2", models)), objective=Objective(dimensions=(16, 8)))
    model = build(recipe, lambda _tokenizer: [])
    model.save(tmp_path / "run", model.settings)
    assert genembed.load(tmp_path / "run").settings.matryoshka_dims == (8, 16)
