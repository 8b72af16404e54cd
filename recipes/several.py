"""Two runs on several devices: an adapter with DDP, and all weights with FSDP.

    torchrun --nproc-per-node 4 -m genembed.cli train -r recipes/several.py:adapter --data pairs.jsonl -o runs/adapter
    torchrun --nproc-per-node 4 -m genembed.cli train -r recipes/several.py:everything --data pairs.jsonl -o runs/everything

`accelerate launch --multi_gpu --num_processes 4 -m genembed.cli train ...` does the same; accelerate's own FSDP and DeepSpeed settings
are refused. `queries` is for one process: four of them contrast 256 pairs with each other. docs/training.md says what is exact.
"""

from __future__ import annotations

from dataclasses import replace

from genembed.settings import GIRCSE
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Evaluation, Lora, Recipe


def adapter(*files: DataFile) -> Recipe:
    """Return a run with an adapter: each process has the whole base model, and the adapter's gradients are averaged (DDP)."""
    return Recipe(
        model="Qwen/Qwen2.5-0.5B",
        settings=GIRCSE,
        files=files,
        objective=Objective(temperature=0.02, regulariser=1.0),
        queries=64,
        chunk=32,
        query_tokens=256,
        passage_tokens=512,
        min_steps=5,
        max_steps=5,
        lora=Lora(rank=64, alpha=32),
        learning_rate=1e-4,
        updates=1_000,
        dtype="bfloat16",
        evaluation=Evaluation(every=200, steps=(1, 3, 5, 10)),
    )


def everything(*files: DataFile) -> Recipe:
    """Return a run of all weights, cut into parts over the processes (FSDP)."""
    return replace(adapter(*files), lora=None, fsdp=True, checkpoint_layers=True, learning_rate=1e-5)
