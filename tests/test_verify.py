"""What is checked when a model is loaded: that we read it as Transformers does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen2 import modeling_qwen2

import doubles
from genembed import Budget, ConfigurationError, ConvergeStop, FixedSteps
from genembed.backbone import Backbone
from genembed.engine import Engine
from genembed.verify import verify


class OwnAttention(nn.Module):
    """Qwen2's attention written out, with no regard for the attention function it is told to call."""

    def __init__(self, original: modeling_qwen2.Qwen2Attention) -> None:
        super().__init__()
        self.original = original

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any, past_key_values: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        layer = self.original
        shape = (*hidden_states.shape[:-1], -1, layer.head_dim)
        query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
        query, key = modeling_qwen2.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, layer.layer_idx)
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * layer.scaling
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        mask = hidden if attention_mask is None else attention_mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        out = scores.softmax(-1).nan_to_num() @ value.repeat_interleave(groups, 1)
        return layer.o_proj(out.transpose(1, 2).flatten(2)), None


def own_attention() -> Backbone:
    """Return Qwen2 with attention that cannot be packed."""
    model = copy.deepcopy(doubles.model("qwen2"))
    for layer in model.base_model.layers:
        layer.self_attn = OwnAttention(layer.self_attn)
    return Backbone(model, doubles.settings_of("qwen2"))


@pytest.mark.parametrize("family", list(doubles.FAMILIES))
def test_every_known_architecture_passes_and_can_be_packed(family: str) -> None:
    backbone = doubles.backbone(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify(backbone)
    assert backbone.packable


def test_attention_that_ignores_the_interface_falls_back_to_padded_batches_with_a_warning() -> None:
    backbone = own_attention()
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM does not .* packed.*: padded batches are used, which is slower"):
        verify(backbone)
    assert not backbone.packable


@pytest.mark.parametrize(
    "rule", [doubles.Schedule((3, 1, 5, 2, 4, 2, 3)), ConvergeStop(0.95, patience=1, max_steps=6), FixedSteps(4)], ids=str
)
@pytest.mark.parametrize("budget", [Budget(), Budget(max_rows=3, prefill_tokens=12, length_ratio=50.0)], ids=["default", "small"])
def test_padded_batches_give_the_vectors_of_packed_ones(rule: Any, budget: Budget) -> None:
    backbone = own_attention()
    with pytest.warns(UserWarning, match="padded batches"):
        verify(backbone)
    prompts = doubles.prompts([9, 3, 12, 5, 9, 1, 7], shared=5)
    found = {}
    for refined in Engine(backbone, budget).run(prompts, rule):
        found |= {int(row): (int(k), v) for row, k, v in zip(refined.index, refined.steps, refined.vectors, strict=True)}
    assert sorted(found) == list(range(7))
    for row, (steps, vector) in found.items():
        expected = doubles.alone(doubles.backbone("qwen2"), prompts[row], rule.max_steps)
        assert steps == doubles.halting_step(expected, rule, row)
        np.testing.assert_allclose(vector, expected[steps], atol=doubles.FLOAT32_INSIDE)


STRANGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shift by position in the vocabulary": lambda logits: logits + torch.linspace(0, 3, logits.shape[-1], dtype=logits.dtype),
    "unknown factor": lambda logits: 1.5 * logits,
    "unknown soft cap": lambda logits: 2 * torch.tanh(logits / 2),
}


@pytest.mark.parametrize("name", list(STRANGE))
def test_a_model_that_makes_its_logits_in_an_unknown_way_is_refused(name: str) -> None:
    model = copy.deepcopy(doubles.model("llama"))
    forward, strange = model.forward, STRANGE[name]

    def altered(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.logits = strange(output.logits)
        return output

    model.forward = altered
    with pytest.raises(ConfigurationError, match=r"LlamaForCausalLM makes its logits in a way genembed does not know .*open an issue"):
        verify(Backbone(model, doubles.settings_of("llama")))


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def built(kind: str, **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.3)
    return model


def test_attention_sinks_are_refused_not_dropped() -> None:
    """SDPA ignores them without a word: logits were off by more than their own size, announced as 'slower'."""
    model = built("gpt_oss", num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ConfigurationError, match="uses s_aux in its attention, which genembed cannot do"):
        verify(Backbone(model, doubles.settings_of("qwen2")))


def test_an_encoder_is_not_taken_for_a_causal_language_model() -> None:
    """Ernie reads both ways unless it is told to be a decoder."""
    with pytest.raises(ConfigurationError, match="lets a token see the ones after it"):
        verify(Backbone(built("ernie", max_position_embeddings=64), doubles.settings_of("qwen2")))
