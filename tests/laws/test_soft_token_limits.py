"""Law 4: a one-hot distribution feeds the token itself, a uniform one the mean of the table."""

from __future__ import annotations

import pytest
import torch

import doubles
from genembed.backbone import Backbone, LogitHead
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch

PROMPT = doubles.prompts([9])[0]
TOKEN = 123


def with_logits(family: str, logits: torch.Tensor) -> Backbone:
    """Return a backbone that gives these logits after any state."""
    backbone = doubles.backbone(family)
    backbone.head = LogitHead(torch.zeros_like(backbone.table), bias=logits)
    return backbone


@pytest.mark.parametrize("family", list(doubles.FAMILIES))
@pytest.mark.parametrize("with_grad", [True, False])
def test_one_hot_logits_feed_the_token_itself(family: str, with_grad: bool) -> None:
    logits = torch.full((doubles.VOCAB,), -1e5, dtype=torch.float64)
    logits[TOKEN] = 0.0
    backbone = with_logits(family, logits)
    with torch.set_grad_enabled(with_grad):
        fed = backbone.next_embeddings(torch.randn(3, doubles.HIDDEN, dtype=torch.float64))
    torch.testing.assert_close(fed, backbone.embed(torch.tensor([TOKEN] * 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", doubles.CAUSAL_FAMILIES)
def test_after_a_one_hot_distribution_the_state_is_that_of_the_token_id(family: str) -> None:
    logits = torch.full((doubles.VOCAB,), -1e5, dtype=torch.float64)
    logits[TOKEN] = 0.0
    backbone = with_logits(family, logits)
    with torch.no_grad():
        rows = CachedRows(backbone, TokenBatch.pad([PROMPT]))
        rows.append(backbone.next_embeddings(rows.last_hidden))
        ids = torch.tensor([[*PROMPT.tolist(), TOKEN]])
        expected = doubles.plain(family).base_model(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(rows.last_hidden, expected, rtol=0, atol=doubles.FLOAT32_INSIDE)


@pytest.mark.parametrize("family", list(doubles.FAMILIES))
@pytest.mark.parametrize("with_grad", [True, False])
def test_uniform_logits_feed_the_mean_of_the_input_embeddings(family: str, with_grad: bool) -> None:
    backbone = with_logits(family, torch.full((doubles.VOCAB,), 7.0, dtype=torch.float64))
    with torch.set_grad_enabled(with_grad):
        fed = backbone.next_embeddings(torch.randn(2, doubles.HIDDEN, dtype=torch.float64))
    expected = backbone.embed(torch.arange(doubles.VOCAB)).mean(0).expand(2, -1)
    torch.testing.assert_close(fed, expected, rtol=0, atol=1e-12)
