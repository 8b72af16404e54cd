"""Law 9, and the baselines: the published families are the same loop with other settings. References use Transformers alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

import doubles
from genembed import Embedder, FixedSteps
from genembed.engine import Engine
from genembed.settings import BIDIRECTIONAL_AVG, CAUSAL_EOS, HARD_TOKENS, LASER

TEXTS = ["What is considered a business expense?", "x", "A language model refines the vector of a text step by step."]


def unit(vector: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vector, dim=-1).detach().numpy()


def laser(model: transformers.PreTrainedModel, text: str, thinking_steps: int) -> torch.Tensor:
    """LaSER as its quick start writes it: softmax over the vocabulary, averaged embeddings, mean over the thinking states."""
    ids = torch.tensor([doubles.tokenizer()(text)["input_ids"]])
    table = model.get_input_embeddings()(torch.arange(doubles.VOCAB))
    fed, cache, states = model.get_input_embeddings()(ids), transformers.DynamicCache(), []
    for _ in range(thinking_steps):
        output = model(inputs_embeds=fed, past_key_values=cache, use_cache=True, output_hidden_states=True)
        states.append(output.hidden_states[-1][:, -1])
        fed = (torch.softmax(output.logits[:, -1], dim=-1) @ table)[:, None]
    return torch.stack(states, dim=1).mean(1)[0]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gemma3"])
@pytest.mark.parametrize("thinking_steps", [1, 3, 5])
def test_laser_is_the_same_loop_with_the_prompts_last_state_pooled(
    embedder_of: Callable[..., Embedder], family: str, thinking_steps: int
) -> None:
    vectors = embedder_of(family, LASER).encode(TEXTS, halt=FixedSteps(thinking_steps - 1))
    for vector, text in zip(vectors, TEXTS, strict=True):
        np.testing.assert_allclose(vector, unit(laser(doubles.plain(family), text, thinking_steps)), atol=doubles.FLOAT32_INSIDE)


def test_laser_runs_three_thinking_steps_by_default(embedder_of: Callable[..., Embedder]) -> None:
    refined = embedder_of("qwen3", LASER).refine(TEXTS)
    assert refined.steps.tolist() == [2, 2, 2]
    np.testing.assert_allclose(refined.vectors[1], unit(laser(doubles.plain("qwen3"), "x", 3)), atol=doubles.FLOAT32_INSIDE)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_hard_tokens_equal_greedy_generation_with_token_ids(embedder_of: Callable[..., Embedder], family: str) -> None:
    model = doubles.plain(family)
    vectors = embedder_of(family, HARD_TOKENS).encode(TEXTS, steps=5)
    for vector, text in zip(vectors, TEXTS, strict=True):
        ids = torch.tensor([doubles.tokenizer()(text, add_special_tokens=False)["input_ids"]])
        prompt = ids.shape[1]
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        states = model.base_model(input_ids=ids).last_hidden_state[0, prompt:]
        np.testing.assert_allclose(vector, unit(states.mean(0)), atol=doubles.FLOAT32_INSIDE)


@pytest.mark.parametrize("family", doubles.CAUSAL_FAMILIES)
def test_causal_eos_is_the_state_of_the_end_of_sequence_token(embedder_of: Callable[..., Embedder], family: str) -> None:
    vectors = embedder_of(family, CAUSAL_EOS).encode(TEXTS)
    tokenizer = doubles.tokenizer()
    for vector, text in zip(vectors, TEXTS, strict=True):
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        np.testing.assert_allclose(
            vector, unit(doubles.plain(family).base_model(input_ids=ids).last_hidden_state[0, -1]), atol=doubles.FLOAT32_INSIDE
        )


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_bidirectional_avg_is_the_mean_of_a_pass_in_which_every_token_sees_every_other(
    embedder_of: Callable[..., Embedder], family: str
) -> None:
    vectors = embedder_of(family, BIDIRECTIONAL_AVG).encode(TEXTS)
    for vector, text in zip(vectors, TEXTS, strict=True):
        ids = torch.tensor([doubles.tokenizer()(text, add_special_tokens=False)["input_ids"]])
        nothing_hidden = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
        states = doubles.plain(family).base_model(input_ids=ids, attention_mask=nothing_hidden).last_hidden_state[0]
        np.testing.assert_allclose(vector, unit(states.mean(0)), atol=doubles.FLOAT32_INSIDE)


def test_an_encoder_read_without_steps_is_the_mean_of_its_own_states() -> None:
    prompts = doubles.prompts([7, 3, 12])
    model = doubles.plain("bert")
    for refined in Engine(doubles.backbone("bert")).run(prompts, FixedSteps(0)):
        for index, vector in zip(refined.index, refined.vectors, strict=True):
            ids = torch.from_numpy(prompts[index])[None]
            nothing_hidden = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
            states = model.bert(input_ids=ids, attention_mask=nothing_hidden).last_hidden_state[0]
            np.testing.assert_allclose(vector, unit(states.mean(0)), atol=doubles.FLOAT32_INSIDE)
