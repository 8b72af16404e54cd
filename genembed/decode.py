"""One decode batch over its life: prompts enter, rows are refined, halted ones leave and are replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from genembed.backbone import Backbone
from genembed.budget import Budget
from genembed.errors import NonFiniteError
from genembed.graphs import RowsCache
from genembed.halting import HaltingRule, Progress
from genembed.native_step import NativeRows
from genembed.packed import PackedRows, SharedPrefix
from genembed.parallel import ParallelRows
from genembed.pooling import accumulation_dtype
from genembed.refine import step
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch, TokenIds


@dataclass(frozen=True)
class Refined:
    """Texts that have just been finished."""

    index: Int[np.ndarray, "rows"]
    """Their positions in the caller's list."""
    vectors: Float[np.ndarray, "rows hidden"]
    """Unit vectors z_{k*}, float32."""
    steps: Int[np.ndarray, "rows"]
    """Refinement steps done, k*."""
    stability: Float[np.ndarray, "rows steps_minus_1"]
    """s_2 .. s_K; NaN after the halt."""
    trajectory: Float[np.ndarray, "rows steps hidden"] | None
    """z_1 .. z_K; NaN after the halt; None unless asked for."""

    @property
    def sound(self) -> Bool[np.ndarray, "rows"]:
        """Whether each vector is one: finite, and not zero."""
        return np.asarray(np.isfinite(self.vectors).all(-1) & (np.abs(self.vectors).max(-1) > 0))

    def check(self) -> None:
        """Refuse a vector that is none.

        Raises:
            NonFiniteError: The message has its row.
        """
        sound = self.sound
        if not sound.all():
            bad = int((~sound).argmax())
            raise NonFiniteError(
                f"row {self.index[bad]}: the embedding is not finite or is zero after {self.steps[bad]} steps; check the model's weights, "
                "or load it with dtype='float32'.",
                row=int(self.index[bad]),
            )


@dataclass(frozen=True)
class Job:
    """One call of `Engine.run`."""

    prompts: Sequence[TokenIds] | Mapping[int, TokenIds]
    halt: HaltingRule
    prefix: SharedPrefix | None = None
    keep_trajectory: bool = False
    first_row: int = 0
    eager: bool = False
    """Admit a text as soon as there is a place, for somebody waits for it, instead of many at a time."""

    @property
    def prefix_length(self) -> int:
        """Leading tokens of every prompt that are read already."""
        return self.prefix.length if self.prefix is not None else 0

    def room(self, row: int) -> int:
        """Positions whose keys and values a row needs by itself."""
        return len(self.prompts[row]) - self.prefix_length + self.halt.max_steps


class DecodeBatch:
    """One decode batch over its life: admit, step, collect."""

    def __init__(
        self, backbone: Backbone, budget: Budget, job: Job, *, max_rows: int, capacity: int, kept: RowsCache | NativeRows | None
    ) -> None:
        self.backbone, self.budget = backbone, budget
        self.job, self.prompts, self.halt = job, job.prompts, job.halt
        self.kept = kept
        self.max_rows, self.capacity = max_rows, capacity if job.halt.max_steps else 0
        self.passes = self.backbone.settings.parallel_passes if job.halt.max_steps else 0
        self.rows: PackedRows | ParallelRows | CachedRows | None = None
        self.progress: Progress | None = None
        self.log = _StepLog(self.backbone, max_rows, job.halt.max_steps, job.keep_trajectory)
        every = budget.check_every or (1 if backbone.device.type == "cpu" else 4)
        self.watch = _Watch(every if backbone.packable else 1, job.halt.max_steps, backbone.device)

    def run(self, waiting: list[int]) -> Iterator[Refined]:
        """Refine all waiting texts (longest first)."""
        waiting.reverse()
        while waiting or len(self):
            refined = self.turn(waiting)
            if refined is not None:
                refined.check()
                yield refined
        if self.kept is not None and isinstance(self.rows, PackedRows):
            self.kept.give(self.rows)

    def __len__(self) -> int:
        """Rows in the batch now."""
        return 0 if self.progress is None else len(self.progress)

    @torch.inference_mode()
    def turn(self, waiting: list[int]) -> Refined | None:
        """Admit some texts, or refine all rows by one step; return rows that are finished then.

        Args:
            waiting: Texts that may be admitted, the next one last; those that were are taken out of it.
        """
        if self._may_admit(len(waiting)):
            self._admit(waiting)
        else:
            self._advance()
        refined = self._collect(self.watch.due())
        self.watch.look()
        return refined

    def _advance(self) -> None:
        assert self.progress is not None
        assert self.rows is not None
        before, riding = self.progress, self.watch.riding
        self.progress, cosine = step(self.backbone, self.rows, before)
        if riding is not None:
            self.progress = self.progress.hold(riding, before)
        self.log.record(self.progress, cosine, riding)
        self.watch.step(self._finished(self.progress))
        if isinstance(self.rows, PackedRows) and self.watch.riding is not None:
            self.rows.hold(self.watch.riding)

    def _finished(self, progress: Progress) -> Bool[Tensor, "rows"]:
        # The pool holds max_steps positions: a rule of a user's own that forgets its last step must not run on.
        return self.halt(progress) | (progress.step >= self.halt.max_steps)

    def _may_admit(self, waiting: int) -> bool:
        if not waiting:
            return False
        if self.progress is None:
            return True
        # Rows without packing cannot take newcomers. Otherwise admit when a quarter of the places is free, or all that wait fit in:
        # prompts read a few at a time cost more than the places they would fill.
        free = self.max_rows - len(self)
        return self.backbone.packable and free >= (1 if self.job.eager else min(waiting, max(1, self.max_rows // 4)))

    def _admit(self, waiting: list[int]) -> None:
        present = len(self)
        taken: list[int] = []
        tokens = 0
        while waiting and present + len(taken) < self.max_rows:
            length = len(self.prompts[waiting[-1]])  # a shared prefix is not read again, but every row attends to it
            if taken and tokens + length > self.budget.prefill_tokens:
                break
            taken.append(waiting.pop())
            tokens += length
        mean, last = self._read([self.prompts[row] for row in taken])
        index = torch.tensor(taken, device=last.device) + self.job.first_row
        new = self.backbone.settings.pooling.start(index, last, mean, window=self.halt.window)
        self.log.admit(present, len(taken))
        self.watch.admit(self._finished(new))
        self.progress = new if self.progress is None else self.progress.extend(new)

    def _read(self, prompts: list[TokenIds]) -> tuple[Tensor, Tensor]:
        if not self.backbone.packable:
            side = self.backbone.settings.padding_side
            self.rows = CachedRows(self.backbone, TokenBatch.pad(prompts, side=side, device=self.backbone.device))
            return self.rows.mean_hidden, self.rows.last_hidden
        if self.rows is None:
            self.rows = self._no_rows()
        assert not isinstance(self.rows, CachedRows)
        self.rows.admit(prompts)
        return self.rows.mean_hidden, self.rows.last_hidden[-len(prompts) :]

    def _no_rows(self) -> PackedRows | ParallelRows:
        if self.passes:
            return ParallelRows(self.backbone, steps=self.halt.max_steps, passes=self.passes, prefix=self.job.prefix)
        if self.kept is not None and self.capacity:
            return self.kept.take(max_rows=self.max_rows, max_tokens=self.capacity, prefix=self.job.prefix)
        return PackedRows(self.backbone, max_rows=self.max_rows, max_tokens=self.capacity, prefix=self.job.prefix)

    def _collect(self, finished: Bool[Tensor, "rows"] | None) -> Refined | None:
        """Take out rows that are finished, and close the gaps they leave."""
        assert self.progress is not None
        assert self.rows is not None
        if finished is None or not bool(finished.any()):
            return None
        refined = self._finish(finished.nonzero()[:, 0])
        keep = surviving_order(finished)
        self.log.select(keep)
        self.watch.select(keep, self.progress.step)
        if len(keep) or not isinstance(self.rows, CachedRows):
            self.rows.select(keep)
        self.progress = self.progress.select(keep) if len(keep) else None
        return refined

    def _finish(self, rows: Int[Tensor, "rows"]) -> Refined:
        assert self.progress is not None
        done = self.progress.select(rows)
        vectors, steps = done.embedding.float().cpu().numpy(), done.step.cpu().numpy()
        index = done.index.cpu().numpy()
        stability, trajectory = self.log.of(rows)
        return Refined(index, vectors, steps, stability, trajectory)


class _Watch:
    """Which rows are finished, seen every few steps, and a few steps late: looking at a value on a device makes everything wait for it.

    A finished row that has not been seen yet rides along; its progress stays as it was.

    Args:
        every: Steps between two looks; at 1 every step is seen at once.
        max_steps: A row that has done as many must not ride.
        device: Where rows are refined.
    """

    def __init__(self, every: int, max_steps: int, device: torch.device) -> None:
        self.every = every
        self.max_steps = max_steps
        self.finished: Bool[Tensor, "rows"] = torch.zeros(0, dtype=torch.bool, device=device)
        self._oldest = self._turns = 0
        self._seen: _Copy | None = None

    @property
    def riding(self) -> Bool[Tensor, "rows"] | None:
        """Rows that are finished and still here; None where every step is seen at once, so that there is none when a step begins."""
        return self.finished if self.every > 1 else None

    def admit(self, finished: Bool[Tensor, "new_rows"]) -> None:
        """Add rows; those that need no step are finished already."""
        self.finished = torch.cat([self.finished, finished])

    def step(self, finished: Bool[Tensor, "rows"]) -> None:
        """Note who is finished after a step of all rows."""
        self.finished = finished if self.every == 1 else self.finished | finished
        self._oldest += 1
        self._turns += 1

    def due(self) -> Bool[Tensor, "rows"] | None:
        """Return the rows to take out now, if it is time to."""
        if self.every == 1 or self._oldest == 0 or self._oldest >= self.max_steps:
            return self.finished
        return self._seen.read(len(self.finished)) if self._seen is not None and self._turns % self.every == 0 else None

    def look(self) -> None:
        """Begin to copy who is finished now, for the next time."""
        if self.every > 1 and self._turns % self.every == 0:
            self._seen = _Copy(self.finished)

    def select(self, keep: Int[Tensor, "kept"], steps: Int[Tensor, "rows"]) -> None:
        """Follow the rows that stay, which have done `steps`."""
        self.finished, self._seen = self.finished[keep], None
        if self.every > 1:
            self._oldest = int(steps[keep].max()) if len(keep) else 0


class _Copy:
    """A mask on its way from the device to the host."""

    def __init__(self, mask: Bool[Tensor, "rows"]) -> None:
        self.device = mask.device
        self._host = torch.empty(len(mask), dtype=torch.bool, pin_memory=mask.is_cuda)
        self._host.copy_(mask, non_blocking=True)
        self._arrived = torch.cuda.Event() if mask.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self, rows: int) -> Bool[Tensor, "rows"] | None:
        """Return the mask as it was, False for the rows that came later; None if it has no row."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if not bool(self._host.any()):
            return None
        return torch.nn.functional.pad(self._host, (0, rows - len(self._host))).to(self.device)


class _StepLog:
    """What happened at each step to the rows now in the batch; row i of the batch is row i here."""

    def __init__(self, backbone: Backbone, max_rows: int, max_steps: int, keep_trajectory: bool) -> None:
        wide = accumulation_dtype(backbone.dtype)
        self.cosines = torch.zeros(max_rows, max_steps, dtype=wide, device=backbone.device)
        shape = (max_rows, max_steps, backbone.hidden_size)
        self.vectors = torch.zeros(shape, dtype=wide, device=backbone.device) if keep_trajectory else None

    def admit(self, first: int, count: int) -> None:
        """Forget what earlier rows left in the places of `count` new ones."""
        for log in self._logs():
            log[first : first + count] = torch.nan

    def record(self, progress: Progress, cosine: Float[Tensor, "rows"], riding: Bool[Tensor, "rows"] | None) -> None:
        """Note s_k and, if wanted, z_k of every row that is not merely riding along."""
        rows, place = torch.arange(len(progress), device=cosine.device), progress.step - 1
        self.cosines[rows, place] = cosine if riding is None else torch.where(riding, self.cosines[rows, place], cosine)
        if self.vectors is not None:
            self.vectors[rows, progress.step - 1] = progress.embedding

    def select(self, keep: Int[Tensor, "kept"]) -> None:
        """Follow the rows that change place."""
        moved = (keep != torch.arange(len(keep), device=keep.device)).nonzero()[:, 0]
        for log in self._logs():
            log[moved] = log[keep[moved]]

    def of(
        self, rows: Int[Tensor, "rows"]
    ) -> tuple[Float[np.ndarray, "rows steps_minus_1"], Float[np.ndarray, "rows steps hidden"] | None]:
        """Return stability (s_2 .. s_K: equation 2 defines no s_1) and trajectory, NaN after the halt."""
        stability = self.cosines[rows, 1:].float().cpu().numpy()
        return stability, None if self.vectors is None else self.vectors[rows].float().cpu().numpy()

    def _logs(self) -> list[Tensor]:
        return [self.cosines] if self.vectors is None else [self.cosines, self.vectors]


def surviving_order(finished: Bool[Tensor, "rows"]) -> Int[Tensor, "kept"]:
    """Order the surviving rows so that as few as possible change place: gaps are filled from the end.

    Survivors whose place is below the new number of rows stay; the others move into the gaps.
    """
    survivors = (~finished).nonzero()[:, 0]
    count = len(survivors)
    order = torch.arange(count, device=finished.device)
    order[finished[:count].nonzero()[:, 0]] = survivors[survivors >= count]
    return order
