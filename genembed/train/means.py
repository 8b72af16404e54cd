"""The loss and its parts as a run logs them: means since the last log line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.train.durable import replace_text
from genembed.train.objective import ObjectiveValue

_FILE = "since_log.json"

Reduce = Callable[[Tensor], Tensor]
"""From the numbers of one process to their mean over all processes."""


class LossMeans:
    """Means of the loss and its parts over the batches since the last log line.

    A checkpoint between two lines keeps them, so that a resumed run logs what an unbroken one does.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Float[Tensor, ""]] = {}
        self._batches = 0

    def add(self, value: ObjectiveValue) -> None:
        """Add what the objective made of a batch; of the step losses the first and the last."""
        numbers = {"loss": value.total.detach()}
        for name, part in value.parts.items():
            numbers |= {f"{name}_first": part[0], f"{name}_last": part[-1]} if part.dim() else {name: part}
        # Only added up here: a number that is read makes an accelerator wait.
        self._sums = {name: self._sums[name] + number if self._batches else number for name, number in numbers.items()}
        self._batches += 1

    def take(self, reduce: Reduce) -> dict[str, float]:
        """Return the means over batches and processes, and begin anew; nothing if there was no batch."""
        batches, sums = self._batches, self._reduced(reduce)
        self._sums, self._batches = {}, 0
        return {name: total / batches for name, total in sums.items()}

    def save(self, folder: Path, reduce: Reduce, *, write: bool) -> None:
        """Write what has been added up since the last log line, if anything; every process must call this.

        Args:
            folder: Of the checkpoint.
            reduce: Joins the processes.
            write: Whether this process is the one that writes.
        """
        sums = self._reduced(reduce)
        if sums and write:
            replace_text(folder / _FILE, json.dumps({"batches": self._batches, "sums": sums}) + "\n")

    def load(self, folder: Path, device: torch.device) -> None:
        """Go on from what `save` wrote; a checkpoint right after a log line has nothing."""
        if (folder / _FILE).is_file():
            value = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            self._batches = value["batches"]
            self._sums = {name: torch.tensor(total, device=device) for name, total in value["sums"].items()}

    def _reduced(self, reduce: Reduce) -> dict[str, float]:
        if not self._batches:
            return {}
        return dict(zip(self._sums, reduce(torch.stack(list(self._sums.values()))).tolist(), strict=True))
