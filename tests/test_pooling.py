"""Pooling: which states make the embedding, with which weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genembed import ConfigurationError, Pooling
from genembed.pooling import accumulation_dtype

LAST = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
MEAN = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
STATES = [torch.tensor([[0.0, 2.0]], dtype=torch.float64), torch.tensor([[4.0, 0.0]], dtype=torch.float64)]


def vectors(pooling: Pooling) -> list[list[float]]:
    """Return z_0, z_1, z_2."""
    progress = pooling.start(torch.tensor([0]), LAST, MEAN, window=1)
    made = [progress.embedding[0].tolist()]
    for state in STATES:
        progress, _ = pooling.advance(progress, state)
        made.append(progress.embedding[0].tolist())
    return made


def unit(*values: float) -> Any:
    vector = torch.tensor(values, dtype=torch.float64)
    return pytest.approx((vector / vector.norm()).tolist())


def test_generated_pools_generated_states_alone_and_has_no_vector_before_the_first() -> None:
    assert vectors(Pooling()) == [[0.0, 0.0], unit(0, 2), unit(4, 2)]


def test_generated_with_the_prompt_state_starts_from_the_prompts_last_state() -> None:
    assert vectors(Pooling(pool_prompt_state=True)) == [unit(3, 4), unit(3, 6), unit(7, 6)]


def test_mean_weighs_the_prompts_mean_state() -> None:
    assert vectors(Pooling(kind="mean", prompt_weight=3.0)) == [unit(1, 0), unit(3, 2), unit(7, 2)]


def test_last_is_the_newest_state_alone() -> None:
    assert vectors(Pooling(kind="last")) == [unit(3, 4), unit(0, 2), unit(4, 0)]


@pytest.mark.parametrize("pooling", [Pooling(), Pooling(pool_prompt_state=True), Pooling(kind="mean", prompt_weight=3.0)])
def test_the_embedding_is_the_weighted_mean_of_the_pooled_states(pooling: Pooling) -> None:
    progress = pooling.start(torch.tensor([0]), LAST, MEAN, window=0)
    for state in STATES:
        progress, _ = pooling.advance(progress, state)
    mean = progress.total / progress.weight[:, None]
    torch.testing.assert_close(torch.nn.functional.normalize(mean, dim=-1), progress.embedding)
    assert progress.step.tolist() == [2]


def test_the_cosine_is_that_of_consecutive_embeddings_and_missing_at_the_first_step() -> None:
    pooling = Pooling(pool_prompt_state=True)
    progress = pooling.start(torch.tensor([0]), LAST, MEAN, window=2)
    assert progress.similarity.tolist() == [[-1.0, -1.0]]
    progress, first = pooling.advance(progress, STATES[0])
    assert first.tolist() == [-1.0]
    before = progress.embedding
    progress, second = pooling.advance(progress, STATES[1])
    assert second.item() == pytest.approx((before * progress.embedding).sum().item())
    assert progress.similarity.tolist() == [[-1.0, second.item()]]


def test_the_window_keeps_the_newest_cosines() -> None:
    pooling = Pooling()
    progress = pooling.start(torch.tensor([0]), LAST, MEAN, window=2)
    cosines = []
    for state in [*STATES, *STATES]:
        progress, cosine = pooling.advance(progress, state)
        cosines.append(cosine.item())
    assert progress.similarity[0].tolist() == cosines[-2:]


def test_half_precision_states_are_summed_in_float32() -> None:
    """In bfloat16 a running sum of 256 ones stops growing at 256."""
    pooling = Pooling()
    one = torch.ones(1, 2, dtype=torch.bfloat16)
    progress = pooling.start(torch.tensor([0]), one, one, window=0)
    for _ in range(300):
        progress, _ = pooling.advance(progress, one)
    assert progress.total[0, 0].item() == 300.0
    assert accumulation_dtype(torch.float64) == torch.float64


@pytest.mark.usefixtures("untyped_caller")
def test_values_without_meaning_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="pooling='max': choose generated, last or mean"):
        Pooling(kind="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="pool_prompt_state=True has no effect with pooling='last'; leave it out"):
        Pooling(kind="last", pool_prompt_state=True)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_prompt_weight_that_is_not_positive_is_refused_with_the_way_out(weight: float) -> None:
    with pytest.raises(ConfigurationError, match=r"prompt_weight=.*for a weight of zero use pooling='generated'"):
        Pooling(kind="mean", prompt_weight=weight)


def test_only_plain_generated_pooling_needs_a_step() -> None:
    assert [
        pooling.needs_steps for pooling in (Pooling(), Pooling(pool_prompt_state=True), Pooling(kind="mean"), Pooling(kind="last"))
    ] == [
        True,
        False,
        False,
        False,
    ]


def test_a_prompt_weight_without_effect_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"prompt_weight=30\.0 has no effect with pooling='last'"):
        Pooling(kind="last", prompt_weight=30.0)
