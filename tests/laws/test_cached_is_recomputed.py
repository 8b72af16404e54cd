"""Law 3: reading one position through the cache equals reading everything again, in values and in gradients."""

from __future__ import annotations

import warnings

import pytest
import torch

import doubles
from genembed import ConfigurationError
from genembed.backbone import Backbone
from genembed.refine import refine
from genembed.tokens import TokenBatch
from gradients import FLOAT32_NORMS, assert_same_gradients, gradients_of

BATCH = TokenBatch.pad(doubles.prompts([5, 11, 2]))


def values_and_gradients(backbone: Backbone, *, cached: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trained = doubles.trainable(backbone)
    trajectory = refine(trained, BATCH, steps=4, cached=cached)
    return trajectory.detach(), gradients_of(trained, trajectory)


def with_checkpointing(backbone: Backbone) -> Backbone:
    trained = doubles.trainable(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Transformers renames the method in version 6
        trained.model.train().gradient_checkpointing_enable()
    return trained


@pytest.mark.parametrize("family", list(doubles.FAMILIES))
def test_cached_equals_recomputed_in_values_and_gradients(family: str) -> None:
    backbone = doubles.backbone(family)
    values, gradients = values_and_gradients(backbone, cached=True)
    again, expected = values_and_gradients(backbone, cached=False)
    torch.testing.assert_close(values, again, rtol=0, atol=1e-11)
    assert_same_gradients(gradients, expected, tolerance=1e-10 if family in ("gpt2", "bert") else FLOAT32_NORMS)


def test_gradients_flow_through_every_soft_token_into_the_embedding_table() -> None:
    """A detached soft token would leave only the prompt's tokens with a gradient."""
    _, gradients = values_and_gradients(doubles.backbone("qwen2"), cached=True)
    table = gradients["model.embed_tokens.weight"].abs().sum(-1)
    assert int((table > 0).sum()) == doubles.VOCAB


def test_the_cache_is_refused_under_gradient_checkpointing() -> None:
    """Transformers drops the cache there with only a warning, and the states come out wrong by O(1)."""
    with pytest.raises(ConfigurationError, match=r"drops the KV cache.*RecomputedRows"):
        refine(with_checkpointing(doubles.backbone("qwen2")), BATCH, steps=2, cached=True)


def test_recomputing_under_gradient_checkpointing_gives_the_plain_gradients() -> None:
    trained = with_checkpointing(doubles.backbone("qwen2"))
    gradients = gradients_of(trained, refine(trained, BATCH, steps=4, cached=False))
    _, expected = values_and_gradients(doubles.backbone("qwen2"), cached=False)
    assert_same_gradients(gradients, expected, tolerance=FLOAT32_NORMS)
