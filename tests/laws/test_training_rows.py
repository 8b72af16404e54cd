"""Training rows give the values and gradients of the reference loop, for every architecture."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers.modeling_layers import GradientCheckpointingLayer

import doubles
from genembed import ConfigurationError, FixedSteps, Pooling
from genembed.backbone import Backbone
from genembed.refine import refine
from genembed.tokens import TokenBatch
from genembed.train.trajectories import trajectories
from gradients import FLOAT32_NORMS, assert_same_gradients, gradients_of

LENGTHS = [5, 11, 2, 3, 30, 11]


def checkpointed(backbone: Backbone) -> Backbone:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Transformers renames the method in version 6
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in backbone.model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
    return backbone


@pytest.mark.parametrize("layers_are_checkpointed", [False, True])
@pytest.mark.parametrize("family", list(doubles.FAMILIES))
def test_trajectories_equal_refine_in_values_and_gradients(family: str, layers_are_checkpointed: bool) -> None:
    prompts = doubles.prompts(LENGTHS)
    reference, trained = doubles.trainable(doubles.backbone(family)), doubles.trainable(doubles.backbone(family))
    expected = refine(reference, TokenBatch.pad(prompts), steps=4)
    if layers_are_checkpointed:
        checkpointed(trained)
    found = trajectories(trained, prompts, steps=4).vectors
    torch.testing.assert_close(found, expected, rtol=0, atol=doubles.FLOAT32_INSIDE if family.startswith("gemma") else 1e-9)
    tolerance = FLOAT32_NORMS if family not in ("gpt2", "bert") else 1e-10
    assert_same_gradients(gradients_of(trained, found), gradients_of(reference, expected), tolerance=tolerance)


@examples(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=7), steps=st.integers(1, 5))
def test_any_batch_equals_its_texts_one_by_one(lengths: list[int], steps: int) -> None:
    backbone, prompts = doubles.backbone("qwen2"), doubles.prompts(lengths)
    together = trajectories(backbone, prompts, steps=steps).vectors
    alone = torch.cat([trajectories(backbone, [ids], steps=steps).vectors for ids in prompts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_one_pass_models_give_z_0_as_their_only_step(attention: str) -> None:
    settings = replace(doubles.backbone("llama").settings, attention=attention, pooling=Pooling(kind="mean"), halt=FixedSteps(0))
    backbone, prompts = Backbone(doubles.model("llama"), settings), doubles.prompts([4, 9])
    found = trajectories(backbone, prompts, steps=0)
    torch.testing.assert_close(found.vectors[:, 0], found.start)
    means = torch.stack([one_pass_states(backbone, ids).mean(0) for ids in prompts])
    torch.testing.assert_close(found.start, torch.nn.functional.normalize(means, dim=-1), rtol=0, atol=1e-9)


def one_pass_states(backbone: Backbone, ids: object) -> torch.Tensor:
    """Read one text with Transformers' own mask."""
    batch = TokenBatch.pad([ids])  # type: ignore[list-item]
    length = batch.mask.shape[1]
    mask = torch.zeros(1, 1, length, length, dtype=backbone.dtype)
    if backbone.causal:
        mask = mask.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), torch.finfo(backbone.dtype).min)
    return backbone.forward(backbone.embed(batch.input_ids), positions=batch.positions, mask=mask, cache=None, generated=False)[0]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="empty batch"):
        trajectories(doubles.backbone("qwen2"), [], steps=1)
