"""Every architecture as refinement sees it: its logits, its embeddings, its limits."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import doubles
from genembed import CheckpointError, ConfigurationError, FixedSteps, Pooling, load
from genembed.backbone import Backbone, LogitHead

IDS = torch.from_numpy(doubles.prompts([9])[0])[None]


@pytest.mark.parametrize("family", doubles.CAUSAL_FAMILIES)
def test_the_head_gives_the_models_own_logits(family: str) -> None:
    model = doubles.plain(family)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[:, -1]
        hidden = model.base_model(input_ids=IDS).last_hidden_state[:, -1]
        torch.testing.assert_close(LogitHead.of(model)(hidden), logits, rtol=0, atol=1e-10)


ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
ONE_PASS = doubles.settings_of("bert", halt=FixedSteps(0), special_tokens=((), ()), pooling=Pooling(kind="last"))


def saved_encoder(kind: str, folder: Path) -> transformers.PreTrainedModel:
    """Save a random encoder with the masked-language-model head its family comes with."""
    sizes = {"vocab_size": doubles.VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, max_position_embeddings=64, type_vocab_size=1, is_decoder=True)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval().requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(0, 0.3)
    made.save_pretrained(folder)
    doubles.tokenizer().save_pretrained(folder)
    return made


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_read_as_transformers_reads_it_or_is_refused(kind: str, tmp_path: Path) -> None:
    """RoBERTa counts positions from the padding id on, not from 0; ELECTRA's embeddings are narrower than its states."""
    model = saved_encoder(kind, tmp_path)
    try:
        embedder = load(tmp_path, preset=ONE_PASS, dtype="float64")
    except (CheckpointError, ConfigurationError):
        return
    text = "What is a business trip?"
    ids = torch.from_numpy(embedder.tokenizer([text]).ids[0])[None]
    nothing_hidden = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
    state = model.base_model(input_ids=ids, attention_mask=nothing_hidden).last_hidden_state[0, -1]
    np.testing.assert_allclose(embedder.encode(text), torch.nn.functional.normalize(state, dim=0), atol=doubles.FLOAT32_INSIDE)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoders_own_head_makes_its_own_logits_or_is_refused(kind: str, tmp_path: Path) -> None:
    """RoBERTa and ELECTRA have a dense layer and a norm before their output embeddings, each in another place."""
    model = saved_encoder(kind, tmp_path)
    try:
        backbone = load(tmp_path, preset=dataclasses.replace(ONE_PASS, halt=FixedSteps(3)), dtype="float64").backbone
    except (CheckpointError, ConfigurationError):
        return
    hidden = model.base_model(input_ids=IDS).last_hidden_state[:, -1]
    torch.testing.assert_close(backbone.head(hidden), model(input_ids=IDS).logits[:, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "scale"), [("qwen2", 1.0), ("gemma", doubles.HIDDEN**0.5), ("gemma3", doubles.HIDDEN**0.5), ("bert", 1.0)]
)
def test_scaled_input_embeddings_are_seen(family: str, scale: float) -> None:
    backbone = doubles.backbone(family)
    own = backbone.embedding_scale
    embedded = doubles.plain(family).get_input_embeddings()(IDS)
    torch.testing.assert_close(backbone.embed(IDS), embedded, rtol=0, atol=1e-12)
    torch.testing.assert_close(backbone.table[IDS] * own, embedded, rtol=0, atol=1e-12)
    if own != 1.0:
        assert own == pytest.approx(scale, rel=1e-6)


class Shifted(nn.Embedding):
    """An embedding layer that does more than scale its table."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) + 1.0


def test_an_embedding_layer_that_is_no_scaling_is_refused() -> None:
    model = copy.deepcopy(doubles.model("qwen2"))
    model.set_input_embeddings(Shifted.from_pretrained(model.get_input_embeddings().weight))
    with pytest.raises(
        ConfigurationError, match="Shifted changes its table rows in a way that is not a scaling; soft tokens cannot follow"
    ):
        Backbone(model, doubles.settings_of("qwen2"))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Qwen2Model has no language-model head, so it cannot generate soft tokens"):
        Backbone(doubles.model("qwen2").base_model, doubles.settings_of("qwen2"))


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 128), ("bert", 128), ("qwen2", None), ("gemma3", None)])
def test_only_learned_positions_are_a_limit(family: str, limit: int | None) -> None:
    assert doubles.backbone(family).max_positions == limit


def test_dimensions_and_dtype_are_those_of_the_weights() -> None:
    backbone = doubles.backbone("bert")
    assert (backbone.hidden_size, backbone.dtype, backbone.device.type, backbone.causal) == (doubles.HIDDEN, torch.float64, "cpu", False)
