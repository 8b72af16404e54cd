"""Recipes by name: the runs of the GIRCSE paper, and one that tries everything in a minute.

A recipe is a function that returns frozen settings; `genembed train --recipe NAME` chooses one, and its options override fields.
The paper's data are the E5 pairs in the layout {query, pos, neg, prompt}: pass them with --data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from genembed.errors import ConfigurationError
from genembed.settings import GIRCSE
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Lora, Recipe

_PAPER_BATCH = 2
_PAPER_ACCUMULATION = 8


def paper_qwen05b(*files: DataFile, samples: int = 50_000) -> Recipe:
    """Return the paper's run on Qwen2.5-0.5B (section 4.1, appendix C)."""
    return _paper("Qwen/Qwen2.5-0.5B", files, samples)


def paper_llama3b(*files: DataFile, samples: int = 50_000) -> Recipe:
    """Return the paper's run on Llama-3.2-3B, which learns ten times faster than the others."""
    return replace(_paper("meta-llama/Llama-3.2-3B", files, samples), learning_rate=1e-4)


def paper_mistral7b(*files: DataFile, samples: int = 200_000) -> Recipe:
    """Return the paper's run on Mistral-7B."""
    return _paper("mistralai/Mistral-7B-v0.1", files, samples)


def paper_qwen7b(*files: DataFile, samples: int = 200_000) -> Recipe:
    """Return the paper's run on Qwen2.5-7B."""
    return _paper("Qwen/Qwen2.5-7B", files, samples)


def _paper(model: str, files: tuple[DataFile, ...], samples: int) -> Recipe:
    """Return the hyperparameters that the paper states: one epoch over `samples` pairs, K = 5, loss summed over the steps."""
    return Recipe(
        model=model,
        settings=GIRCSE,
        files=files,
        objective=Objective(temperature=0.02, reduction="sum", regulariser=1.0),
        queries=_PAPER_BATCH,
        accumulation=_PAPER_ACCUMULATION,
        query_tokens=256,
        passage_tokens=2048,
        passage_rule="released",
        min_steps=5,
        max_steps=5,
        lora=Lora(rank=64, alpha=32, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        learning_rate=1e-5,
        warmup_ratio=0.1,
        updates=max(1, samples // (_PAPER_BATCH * _PAPER_ACCUMULATION)),
        dtype="bfloat16",
    )


RECIPES: Mapping[str, Callable[..., Recipe]] = {
    "paper-qwen05b": paper_qwen05b,
    "paper-llama3b": paper_llama3b,
    "paper-mistral7b": paper_mistral7b,
    "paper-qwen7b": paper_qwen7b,
}


def named_recipe(name: str) -> Callable[..., Recipe]:
    """Look a recipe up.

    Raises:
        ConfigurationError: If the name is unknown.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}, or a file: my_recipes.py:my_run.")
    return RECIPES[name]
