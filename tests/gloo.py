"""Training runs in several processes that talk by gloo, as a launcher would start them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from genembed.train.gather import leave_group
from genembed.train.run import train
from genembed.train.trainer import StepwiseTrainer

Runs = Mapping[str, Mapping[str, Any]]
"""By the name of its folder, what `train` is called with."""


def in_processes(number: int, runs: Runs, folder: Path) -> None:
    """Make runs one after another, in as many processes; each run's folder lies in `folder`."""
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    if number == 1:
        _make(0, runs, folder)
        return
    torch.multiprocessing.spawn(_work, args=(number, runs, folder, meeting), nprocs=number)


def _work(process: int, number: int, runs: Runs, folder: Path, meeting: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=process, world_size=number, timeout=timedelta(seconds=60)
    )
    _make(process, runs, folder)
    leave_group()


def _make(process: int, runs: Runs, folder: Path) -> None:
    compute = StepwiseTrainer.compute_loss
    for name, options in runs.items():
        with (folder / f"{name}.{process}.queries").open("a") as file:

            def watched(self: StepwiseTrainer, model: Any, inputs: dict[str, Any], *rest: Any, file: Any = file, **others: Any) -> Any:
                batch = inputs["batch"]
                file.write(json.dumps([batch.number, *(pair.query for pair in batch.pairs)]) + "\n")
                return compute(self, model, inputs, *rest, **others)

            StepwiseTrainer.compute_loss = watched  # type: ignore[method-assign]
            try:
                train(output=folder / name, **options)
            finally:
                StepwiseTrainer.compute_loss = compute  # type: ignore[method-assign]


def queries_seen(folder: Path, name: str) -> dict[int, list[list[str]]]:
    """Return the queries of every batch of a run, those of each process by themselves."""
    seen: dict[int, list[list[str]]] = {}
    for path in sorted(folder.glob(f"{name}.*.queries")):
        for line in path.read_text().splitlines():
            number, *queries = json.loads(line)
            seen.setdefault(number, []).append(queries)
    return seen
