"""The models that benchmarks of speed run on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from genembed import FixedSteps, checkpoint, source
from genembed.backbone import Backbone, SoftTokenHead
from genembed.cost import Shape
from genembed.pooling import Pooling
from genembed.settings import GIRCSE

MINI = "mini"


def load_mini() -> Backbone:
    """Return the built-in model."""
    return checkpoint.load(source.resolve(MINI, adapter=None, preset=None, offline=True), device="cpu", dtype="float32").backbone


def load_mini_full() -> Backbone:
    """Return the built-in model with a head that speaks its whole vocabulary, as its first version did."""
    mini = load_mini()
    assert mini.trained_head is not None
    head = SoftTokenHead(mini.hidden_size, len(mini.table))
    head.dense, head.norm = mini.trained_head.dense, mini.trained_head.norm
    return Backbone(mini.model, mini.settings, head=head.eval().requires_grad_(False))


def load_qwen(dtype: torch.dtype = torch.float32) -> Backbone:
    """Return a random model of Qwen2.5-0.5B's shape, with logits neither flat nor one-hot."""
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval().requires_grad_(False)
    return Backbone(model, GIRCSE)


def one_pass(backbone: Backbone) -> Backbone:
    """Return the same weights as a Causal-EOS embedder."""
    settings = replace(backbone.settings, pooling=Pooling(kind="last"), halt=FixedSteps(0))
    return Backbone(backbone.model, settings, head=backbone.trained_head)


def parallel(backbone: Backbone, passes: int) -> Backbone:
    """Return the same weights, read in so many passes."""
    settings = replace(backbone.settings, parallel_passes=passes)
    stepper = backbone.stepper if backbone.adapter_on_generated_only else None
    return Backbone(backbone.model, settings, head=backbone.trained_head, stepper=cast("Any", stepper))


def shape_of(config: PreTrainedConfig, *, causal: bool = True, spoken: int | None = None) -> Shape:
    """Count a configuration."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return Shape.of(Path(folder), causal=causal, spoken=spoken)


def shape_of_backbone(backbone: Backbone) -> Shape:
    """Count a model as it is read."""
    return shape_of(backbone.model.config, causal=backbone.settings.attention == "causal", spoken=len(backbone.spoken))


LOADERS: Mapping[str, Callable[[], Backbone]] = {
    "mini": load_mini,
    "mini-full": load_mini_full,
    "qwen": load_qwen,
    "qwen-bf16": partial(load_qwen, torch.bfloat16),
}
"""By the names that command lines take."""
