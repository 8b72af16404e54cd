"""Law 3: reading one position through the cache equals reading everything again, in values and in gradients."""

from __future__ import annotations

import copy

import pytest
import torch

import doubles
from genembed import ConfigurationError
from genembed.backbone import Backbone
from genembed.refine import refine
from genembed.tokens import TokenBatch

BATCH = TokenBatch.pad(doubles.prompts([5, 11, 2]))


def values_and_gradients(backbone: Backbone, *, cached: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trained = doubles.trainable(backbone)
    trajectory = refine(trained, BATCH, steps=4, cached=cached)
    weights = torch.linspace(-1, 1, trajectory.numel(), dtype=trajectory.dtype).view_as(trajectory)
    (trajectory * weights).sum().backward()
    modules = [trained.model] if trained.trained_head is None else [trained.model, trained.trained_head]
    named = [item for module in modules for item in module.named_parameters()]
    return trajectory.detach(), {name: weight.grad for name, weight in named if weight.grad is not None}


@pytest.mark.parametrize("family", list(doubles.FAMILIES))
def test_cached_equals_recomputed_in_values_and_gradients(family: str) -> None:
    backbone = doubles.backbone(family)
    values, gradients = values_and_gradients(backbone, cached=True)
    again, expected = values_and_gradients(backbone, cached=False)
    torch.testing.assert_close(values, again, rtol=0, atol=1e-11)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-9, msg=name)


def test_gradients_flow_through_every_soft_token_into_the_embedding_table() -> None:
    """A detached soft token would leave only the prompt's tokens with a gradient."""
    _, gradients = values_and_gradients(doubles.backbone("qwen2"), cached=True)
    table = gradients["model.embed_tokens.weight"].abs().sum(-1)
    assert int((table > 0).sum()) == doubles.VOCAB


def test_the_cache_is_refused_under_gradient_checkpointing() -> None:
    """Transformers drops the cache there with only a warning, and the states come out wrong by O(1)."""
    trained = doubles.trainable(doubles.backbone("qwen2"))
    trained.model.train()
    trained.model.gradient_checkpointing_enable()
    with pytest.raises(ConfigurationError, match=r"drops the KV cache.*gradient_checkpointing_disable\(\)"):
        refine(trained, BATCH, steps=2, cached=True)


def test_recomputing_under_gradient_checkpointing_gives_the_plain_gradients() -> None:
    backbone = doubles.backbone("qwen2")
    trained = Backbone(copy.deepcopy(backbone.model), backbone.settings)
    trained.model.requires_grad_(True).train()
    trained.model.gradient_checkpointing_enable()
    trajectory = refine(trained, BATCH, steps=4, cached=False)
    weights = torch.linspace(-1, 1, trajectory.numel(), dtype=trajectory.dtype).view_as(trajectory)
    (trajectory * weights).sum().backward()
    _, expected = values_and_gradients(backbone, cached=False)
    for name, weight in trained.model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-8, atol=1e-9, msg=name)
