"""How many processes a run has: what a launcher may not ask for, and how a run goes on with another number of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from genembed.errors import ConfigurationError
from genembed.train.recipe import Recipe

_THEIRS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""What `accelerate launch` sets, and what would then wrap the model."""


def check_launch(recipe: Recipe, processes: int) -> None:
    """Refuse a way of starting that cannot work, before a model is loaded.

    Raises:
        ConfigurationError: With the way that does.
    """
    for variable, name in _THEIRS.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigurationError(
                f"accelerate launch was told to use {name}, which wraps one forward pass of a model, and refinement is several; start with "
                "--multi_gpu (DDP), and to cut all weights into parts give genembed train --fsdp."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16" if recipe.dtype == "bfloat16" else "no"):
        raise ConfigurationError(
            f"accelerate launch was told mixed_precision={precision}, and the recipe dtype={recipe.dtype!r}: leave it out there, and "
            "choose dtype='float32' or 'bfloat16' in the recipe."
        )
    if recipe.fsdp and processes == 1:
        raise ConfigurationError(
            "fsdp=True with one process: there is nobody to share the weights with. Start one process for each device, "
            "torchrun --nproc-per-node 4 -m genembed.cli train ..., or leave fsdp out."
        )


def continued(recipe: Recipe, before: Mapping[str, Any], processes: int) -> Recipe:
    """Return the recipe under which the processes go on with a run of another number of them: their batch together stays what it was.

    Args:
        recipe: As the user gives it now.
        before: The recipe as it was written beside the run, with the number of its processes.
        processes: Their number now.

    Raises:
        ConfigurationError: If the run's batch cannot be shared among these processes.
    """
    size = before["queries"] * before["processes"]
    started = f"the run has batches of {size} pairs, {before['queries']} in each of {before['processes']} processes"
    if processes != before["processes"] and not recipe.gather:
        raise ConfigurationError(
            f"{started}, each contrasted by itself (gather=False): {processes} processes would learn something else. Go on with "
            f"{before['processes']}, or choose another folder."
        )
    if recipe.queries * processes == size:
        return recipe
    if recipe.queries != before["queries"]:
        raise ConfigurationError(
            f"{started}; queries={recipe.queries} in {processes} would be {recipe.queries * processes}. Leave queries as it was, and each "
            "process takes its share; or choose another folder."
        )
    if size % processes:
        fitting = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
        raise ConfigurationError(f"{started}, which {processes} processes cannot share equally; go on with one of {fitting}.")
    return replace(recipe, queries=size // processes)
