"""A step of refinement recorded once and replayed: on a GPU, launching a step's hundreds of small kernels takes longer than running them.

Replaying needs every tensor in the same place, of the same shape, and no look at any value in between. So a step works on a bucket of
rows, the next power of two, over all positions of its slots; rows that are not there compute nothing of use.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from genembed.errors import GenembedWarning
from genembed.packed import PackedRows, SharedPrefix

if TYPE_CHECKING:
    from genembed.backbone import Backbone

WARM_UP = 3
"""Steps of a bucket before it is recorded: libraries choose their kernels and allocate in the first ones, which cannot be replayed."""
_TOKENS = 64
"""Tokens of a slot are a multiple of this."""
_TOLERANCE = 0.05
"""Of a replayed step, as a share of the largest state."""


@runtime_checkable
class Recording(Protocol):
    """What was done once and can be done again, on the same tensors."""

    def replay(self) -> None:
        """Do it again."""


class FixedStep:
    """One refinement step of up to `bucket` rows over the slots of `rows`, with every tensor at a fixed place.

    It gives what `PackedRows.generate` gives, and writes keys and values where that would.

    Args:
        rows: Rows in whose slots the step writes; at least `bucket` slots.
        bucket: Rows of the step, with those that are not there.
    """

    def __init__(self, rows: PackedRows, bucket: int) -> None:
        self.bucket = bucket
        self.hidden: Float[Tensor, "bucket hidden"] = rows.last_hidden.new_zeros(bucket, rows.backbone.hidden_size)
        self.lengths: Int[Tensor, "bucket"] = rows.lengths.new_zeros(bucket)
        self._slots = copy.copy(rows)
        self._slots.fix(self.lengths)

    def load(self, last_hidden: Float[Tensor, "rows hidden"], lengths: Int[Tensor, "rows"]) -> None:
        """Put the rows in their places. Those that are not there write at the beginning of slots that are free."""
        for buffer, values in ((self.hidden, last_hidden), (self.lengths, lengths)):
            buffer[: len(values)] = values
            buffer[len(values) :] = 0

    def run(self) -> None:
        """Do the step: from the states of all rows to their next ones."""
        self.hidden.copy_(self._slots.read_next(self._slots.backbone.next_embeddings(self.hidden)))


Recorder = Callable[[FixedStep], Recording]
"""Makes a recording of a step."""


class RecordedSteps:
    """The steps of some rows, recorded by bucket once a step of as many rows has been done a few times.

    Args:
        record: Makes a recording of a step.
    """

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.broken = False
        self._steps: dict[int, tuple[FixedStep, Recording]] = {}
        self._uses: dict[int, int] = {}

    def __call__(self, rows: PackedRows) -> bool:
        """Add a soft token to every row by a recording, if there is one or can be one; tell whether it was done."""
        bucket = bucket_of(len(rows), rows.max_rows)
        self._uses[bucket] = self._uses.get(bucket, 0) + 1
        if self._uses[bucket] > WARM_UP and not self.broken and bucket not in self._steps:
            self._try(rows, bucket)
        if bucket not in self._steps:
            return False
        step, recording = self._steps[bucket]
        step.load(rows.last_hidden, rows.lengths)
        recording.replay()
        rows.accept(step.hidden[: len(rows)].clone())
        return True

    def _try(self, rows: PackedRows, bucket: int) -> None:
        """Record a step, and compare what it replays with the step itself before it is trusted."""
        step = FixedStep(rows, bucket)
        try:
            step.load(rows.last_hidden, rows.lengths)
            step.run()
            expected = step.hidden.clone()
            recording = self.record(step)
            step.load(rows.last_hidden, rows.lengths)
            recording.replay()
            wrong = ((step.hidden - expected)[: len(rows)].abs().max() / expected[: len(rows)].abs().max()).item()
            reason = None if wrong <= _TOLERANCE else f"a replay differs from the step by {wrong:.2g}"
        except Exception as error:  # noqa: BLE001 - models, drivers and libraries refuse recording with errors of many kinds
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if reason is None:
            self._steps[bucket] = step, recording
            return
        self.broken = True
        warnings.warn(f"steps are not recorded as CUDA graphs but launched one by one ({reason}).", GenembedWarning, stacklevel=2)


class RowsCache:
    """Rows of finished decode batches, kept with their recordings for the next batch of the same size.

    Sizes are rounded up, so that there are few of them. Rows that are in use are not here: batches may overlap.

    Args:
        backbone: The model.
        record: Makes a recording of a step.
        size: Batches that are kept; each holds its keys and values.
    """

    def __init__(self, backbone: Backbone, *, record: Recorder, size: int = 2) -> None:
        self.backbone = backbone
        self.record = record
        self.size = size
        self._kept: list[PackedRows] = []

    def take(self, *, max_rows: int, max_tokens: int, prefix: SharedPrefix | None) -> PackedRows:
        """Return rows of at least this size over this prefix, without a row in them."""
        slots, tokens = bucket_of(max_rows, 1 << 62), -(-max_tokens // _TOKENS) * _TOKENS
        for place, rows in enumerate(self._kept):
            if (rows.max_rows, rows.max_tokens) == (slots, tokens) and rows.prefix is prefix:
                return self._kept.pop(place)
        del self._kept[self.size - 1 :]  # before the new ones are there, which need room
        return PackedRows(self.backbone, max_rows=slots, max_tokens=tokens, prefix=prefix, replay=RecordedSteps(self.record))

    def give(self, rows: PackedRows) -> None:
        """Keep rows for later."""
        rows.clear()
        self._kept = [rows, *self._kept[: self.size - 1]]

    def clear(self) -> None:
        """Let go of all of them."""
        self._kept.clear()


def bucket_of(rows: int, most: int) -> int:
    """Return how many rows a step of so many is computed for: the next power of two, and never more than the slots."""
    return min(1 << (rows - 1).bit_length(), most)


def cuda_graph(step: FixedStep) -> Recording:
    """Record a step as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    return graph
