"""The soft token: exact, and block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import doubles
from genembed import ConfigurationError
from genembed.soft_token import Scores, blocked_soft_token, hard_token, recomputed_soft_token, soft_token, straight_through

VOCAB = 23


def blocked(logits: torch.Tensor, table: torch.Tensor, sizes: Sequence[int], temperature: float) -> torch.Tensor:
    spans = torch.arange(len(table)).split(list(sizes))
    return blocked_soft_token(
        [lambda span=span: logits[:, span].clone() for span in spans],
        [lambda weights, span=span: weights @ table[span] for span in spans],
        temperature=temperature,
    )


def test_the_soft_token_is_the_average_of_the_table_under_the_distribution() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0]], dtype=torch.float64)
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    assert soft_token(logits, table)[0].tolist() == pytest.approx([1.5, 1.25])
    # At temperature 1/2 probabilities are squared and normalised: 4/6, 1/6, 1/6.
    assert soft_token(logits, table, temperature=0.5)[0].tolist() == pytest.approx([8 / 6, 5 / 6])


def test_towards_temperature_zero_the_soft_token_is_the_hard_one() -> None:
    logits, table = torch.randn(4, VOCAB, dtype=torch.float64), torch.randn(VOCAB, 5, dtype=torch.float64)
    torch.testing.assert_close(soft_token(logits, table, temperature=1e-4), hard_token(logits, table))


@given(
    sizes=st.lists(st.integers(1, VOCAB), min_size=1, max_size=8),
    temperature=st.floats(0.05, 20.0),
    scale=st.sampled_from([0.0, 1.0, 30.0, 800.0]),
    seed=st.integers(0, 2**31),
)
@examples(max_examples=100)
def test_blocked_equals_exact_for_any_block_sizes_and_temperature(sizes: list[int], temperature: float, scale: float, seed: int) -> None:
    """Logits of 800 overflow an exponential in float64 unless the maximum is taken off."""
    random = torch.Generator().manual_seed(seed)
    vocab = sum(sizes)
    logits = scale * torch.randn(3, vocab, dtype=torch.float64, generator=random)
    table = torch.randn(vocab, 4, dtype=torch.float64, generator=random)
    exact = soft_token(logits, table, temperature=temperature)
    torch.testing.assert_close(blocked(logits, table, sizes, temperature), exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_a_maximum_in_any_block_is_found(order: list[int]) -> None:
    logits, table = torch.tensor([[-1e4, 0.0, 1e4]], dtype=torch.float64)[:, order], torch.eye(3, dtype=torch.float64)
    assert blocked(logits, table, [1, 1, 1], 1.0)[0].tolist() == [float(place == 2) for place in order]


def test_the_softmax_of_half_precision_logits_is_taken_in_float32() -> None:
    """In bfloat16, 10 / 0.3 and 9.9375 / 0.3 are multiples of 0.25, and the weights would be wrong by percents."""
    logits = torch.tensor([[10.0, 9.9375]], dtype=torch.bfloat16)
    made = soft_token(logits, torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16), temperature=0.3)
    assert made.dtype == torch.bfloat16
    assert made.item() == pytest.approx(1 / (1 + math.exp(0.0625 / 0.3)), rel=0.005)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused_with_the_way_out(temperature: float) -> None:
    with pytest.raises(ConfigurationError, match=r"temperature=.*for the single likeliest token use tokens='hard'"):
        soft_token(torch.zeros(1, 2), torch.zeros(2, 2), temperature=temperature)
    with pytest.raises(ConfigurationError, match="must be positive"):
        blocked_soft_token([], [], temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("family", list(doubles.FAMILIES))
def test_without_gradient_the_next_embedding_is_the_one_with_gradient(
    family: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma2 has a soft cap between the blocks' products and the softmax, Gemma a scaling after it."""
    monkeypatch.setattr("genembed.backbone.BLOCK", 96)
    backbone = doubles.backbone(family, temperature=temperature)
    hidden = 3 * torch.randn(5, doubles.HIDDEN, dtype=torch.float64)
    with torch.enable_grad():
        exact = backbone.next_embeddings(hidden)
    with torch.no_grad():
        torch.testing.assert_close(backbone.next_embeddings(hidden), exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scores", [Scores(), Scores(scale=0.5), Scores(softcap=2.0), Scores(scale=3.0, softcap=1.5)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_recomputed_soft_token_has_the_gradients_of_the_plain_one(scores: Scores, tied: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, table = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (3, VOCAB, VOCAB))
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    table = weight if tied else table
    inputs = [hidden, weight, bias] + ([] if tied else [table])
    gradient = torch.randn(3, 5, dtype=torch.float64)
    plain = soft_token(scores(hidden @ weight.T + bias), table, temperature=0.7)
    recomputed = recomputed_soft_token(hidden, weight, bias, table, temperature=0.7, scores=scores, block=7)
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-13)
    expected = torch.autograd.grad(plain, inputs, gradient)
    for found, right in zip(torch.autograd.grad(recomputed, inputs, gradient), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_the_recomputed_soft_token_passes_gradcheck() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 9))
    assert torch.autograd.gradcheck(
        lambda h, w: recomputed_soft_token(h, w, None, w, temperature=1.3, scores=Scores(softcap=4.0), block=4), (hidden, weight)
    )


def test_the_recomputed_soft_token_keeps_nothing_as_wide_as_the_vocabulary() -> None:
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    hidden, weight = torch.randn(3, 5, requires_grad=True), torch.randn(1000, 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        recomputed_soft_token(hidden, weight, None, weight, block=100)
    assert sorted(set(kept)) == [3, 15, 5000]  # log-normaliser, hidden states and average, the weights themselves


def test_a_hard_token_passes_the_gradient_of_the_soft_one_straight_through() -> None:
    hard, soft = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    result = straight_through(hard, soft)
    torch.testing.assert_close(result, hard)
    (result * 2).sum().backward()
    assert soft.grad is not None
    assert soft.grad.tolist() == [[2.0] * 3] * 2
