"""The fused soft token in Triton's interpreter; test_triton_soft_token.py runs this file in a process of its own."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

import doubles
from genembed.cuda import Tiling, fused_soft_token
from genembed.soft_token import Scores, hard_token, recomputed_soft_token, soft_token

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 before Triton is imported")

SMALL = Tiling(entries=16, splits=3)
"""Several tiles in a split of some dozen vocabulary entries, and few programs."""


def random(rows: int, vocab: int, hidden: int, *, tied: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Return hidden states, output embeddings, bias and input embeddings."""
    weight = torch.randn(vocab, hidden, dtype=dtype)
    return torch.randn(rows, hidden, dtype=dtype), weight, torch.randn(vocab, dtype=dtype), weight if tied else torch.randn_like(weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden"),
    [
        (1, 5, 3),  # splits without a tile
        (16, 144, 128),  # nothing to pad
        (17, 145, 130),  # one more of everything
        (33, 61, 20),  # three blocks of rows
    ],
)
def test_the_fused_soft_token_is_the_exact_one(rows: int, vocab: int, hidden: int, tied: bool) -> None:
    states, weight, bias, table = random(rows, vocab, hidden, tied=tied)
    logits = states @ weight.T + bias
    average, log_normaliser = fused_soft_token(states, weight, bias, table, 0.7, Scores(), cut=SMALL)
    torch.testing.assert_close(average, soft_token(logits, table, temperature=0.7), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_normaliser, torch.logsumexp(logits / 0.7, -1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("scores", [Scores(scale=0.5), Scores(softcap=2.0), Scores(scale=3.0, softcap=1.5)])
def test_what_a_family_does_to_the_products_is_done(scores: Scores, biased: bool) -> None:
    states, weight, full_bias, table = random(3, 70, 8, tied=True)
    bias = full_bias if biased else None
    exact = soft_token(scores(torch.nn.functional.linear(states, weight, bias)), table)
    torch.testing.assert_close(fused_soft_token(states, weight, bias, table, 1.0, scores, cut=SMALL)[0], exact, rtol=0, atol=1e-12)


def test_as_many_splits_as_on_a_device_give_the_exact_soft_token() -> None:
    """Most of them are empty here, as with a vocabulary of less than splits x entries."""
    states, weight, bias, table = random(2, 500, 8, tied=False)
    average, _ = fused_soft_token(states, weight, bias, table, 1.0, Scores(), cut=Tiling(entries=16))
    torch.testing.assert_close(average, soft_token(states @ weight.T + bias, table), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3)])
def test_sums_are_float32_for_narrower_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """In float16 what remains is the rounding of the shares, 2^-11 of each; the interpreter knows no bfloat16."""
    states, weight, bias, table = random(4, 90, 24, tied=True, dtype=dtype)
    exact = soft_token((states.double() @ weight.double().T + bias.double()), table.double())
    average, log_normaliser = fused_soft_token(states, weight, bias, table, 1.0, Scores(), cut=SMALL)
    assert average.dtype == log_normaliser.dtype == torch.float32
    torch.testing.assert_close(average.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_alone_is_the_row_in_a_batch(dtype: torch.dtype) -> None:
    """To the last bits: the interpreter multiplies with NumPy, whose BLAS may round a product by where its matrix lies in memory."""
    close = partial(torch.testing.assert_close, rtol=0, atol=4 * torch.finfo(dtype).eps)
    states, weight, bias, table = random(19, 70, 20, tied=True, dtype=dtype)
    together = fused_soft_token(states, weight, bias, table, 0.7, Scores(), cut=SMALL)[0]
    for row in (0, 7, 15, 16, 18):
        alone = fused_soft_token(states[row : row + 1], weight, bias, table, 0.7, Scores(), cut=SMALL)[0]
        close(alone[0], together[row])
    backwards = fused_soft_token(states.flip(0), weight, bias, table, 0.7, Scores(), cut=SMALL)[0]
    close(backwards.flip(0), together)


def peaked(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states and output embeddings with one logit of 30,000 a row, in every split in turn, 0 and -10,000."""
    weight = torch.zeros(60, 20, dtype=dtype)
    weight[torch.arange(0, 60, 15), torch.arange(4)] = 1.0
    return 4e4 * torch.eye(20, dtype=dtype)[:4] - 1e4, weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_logits_choose_one_token_exactly(dtype: torch.dtype) -> None:
    states, weight = peaked(dtype)
    table = torch.randn(60, 20, dtype=dtype)
    average, log_normaliser = fused_soft_token(states, weight, None, table, 1.0, Scores(), cut=SMALL)
    assert torch.equal(average, hard_token(states @ weight.T, table))
    assert log_normaliser[:, 0].tolist() == [3e4] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_products_under_a_softcap_do_not_overflow(dtype: torch.dtype) -> None:
    """An exponential of 2 x 30,000 / 5 would."""
    states, weight = peaked(dtype)
    table, capped = torch.randn(60, 20, dtype=dtype), Scores(softcap=5.0)
    average, _ = fused_soft_token(states, weight, None, table, 1.0, capped, cut=SMALL)
    torch.testing.assert_close(average, soft_token(capped(states @ weight.T), table))


@pytest.mark.parametrize("tied", [True, False])
def test_with_the_recomputing_backward_it_passes_gradcheck(tied: bool) -> None:
    states, weight, bias, table = (tensor.requires_grad_() for tensor in random(2, 9, 3, tied=tied))
    forward = partial(fused_soft_token, cut=Tiling(entries=16, splits=1))

    def tied_or_not(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, e: torch.Tensor | None = None) -> torch.Tensor:
        e = w if e is None else e
        return recomputed_soft_token(h, w, b, e, temperature=1.3, scores=Scores(softcap=4.0), block=4, forward=forward)

    assert torch.autograd.gradcheck(tied_or_not, (states, weight, bias) if tied else (states, weight, bias, table))


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_backbone_that_fuses_gives_the_next_embedding_of_one_that_does_not(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = doubles.backbone(family, temperature=0.3)
    hidden = 3 * torch.randn(3, doubles.HIDDEN, dtype=torch.float64)
    with torch.inference_mode():
        blocked = backbone.next_embeddings(hidden)
        calls: list[Tiling] = []
        monkeypatch.setattr("genembed.cuda.fuses", lambda *_: True)
        monkeypatch.setattr("genembed.cuda._tiling", lambda *_: calls.append(SMALL) or SMALL)
        torch.testing.assert_close(backbone.next_embeddings(hidden), blocked, rtol=1e-11, atol=1e-11)
    assert calls == [SMALL]
