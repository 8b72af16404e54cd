"""The fast loop: prompts enter, halted rows leave at once, waiting texts take their places."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from genembed.backbone import Backbone
from genembed.errors import ConfigurationError, NonFiniteError, OutOfMemoryError
from genembed.halting import HaltingRule, Progress
from genembed.packed import PackedRows, PrefixCache, SharedPrefix
from genembed.parallel import ParallelRows
from genembed.pooling import accumulation_dtype
from genembed.refine import step
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch, TokenIds, common_prefix


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is worked on at once. Memory follows from this, whatever the number of texts."""

    batch_tokens: int = 32_768
    """Positions (prompt and generated, over all rows) whose keys and values one decode batch may hold."""
    max_rows: int = 256
    """Rows in one decode batch."""
    prefill_tokens: int = 1_024
    """Prompt tokens read in one pass; a longer prompt is read alone."""
    length_ratio: float = 3.0
    """Texts share a decode batch if the longest is at most this much longer than the shortest."""
    min_prefix: int = 4
    """Shared leading tokens below this number are not worth a cache of their own."""
    kept_prefixes: int = 8
    """Instructions whose keys and values are kept for later calls; 0 keeps none."""
    pack_weights: bool = True
    """On CPU in float32 or bfloat16, keep a packed copy of the weights: faster, for the memory of the copy."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("batch_tokens", "max_rows", "prefill_tokens", "min_prefix"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.kept_prefixes < 0:
            raise ConfigurationError(f"kept_prefixes={self.kept_prefixes}: must be at least 0.")
        if self.length_ratio < 1:
            raise ConfigurationError(f"length_ratio={self.length_ratio}: must be at least 1.")


DEFAULT_BUDGET = Budget()
"""Limits that suit a CPU with small models; 600 MB of keys and values for `mini`."""


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


class Engine:
    """Refines many texts with as few passes as their halting allows.

    Texts are sorted by length and cut into groups of similar length. Within a group, prompts are read in micro-batches of
    a token budget and refined in one decode batch; a row that halts leaves after that step, and waiting texts enter as
    soon as enough places are free. Results do not depend on the order or the batch (in float64 exactly; in float32 to
    rounding).

    Args:
        backbone: The model.
        budget: Limits of the decode batch and of the prompt passes.
    """

    def __init__(self, backbone: Backbone, budget: Budget = DEFAULT_BUDGET) -> None:
        self.backbone = backbone
        self.budget = budget
        self.prefixes = PrefixCache(backbone, size=budget.kept_prefixes)
        if budget.pack_weights:
            backbone.pack_weights()

    def run(
        self, prompts: Sequence[TokenIds], halt: HaltingRule, *, keep_trajectory: bool = False, first_row: int = 0, shared: int = 0
    ) -> Iterator[Refined]:
        """Refine every prompt, yielding texts as they finish, in any order.

        Args:
            prompts: Token ids, each of at least one token.
            halt: When a text is finished.
            keep_trajectory: Also return z_1 .. z_K, which takes `hidden * max_steps` floats a text.
            first_row: Number of the first prompt in the caller's list; results and errors count from it.
            shared: Leading tokens that the prompts of later calls are likely to begin with as well, as an instruction's: what is read of
                them is kept (`Budget.kept_prefixes`).

        Raises:
            ConfigurationError: If the model cannot follow the rule.
            NonFiniteError: If a vector is not finite or zero; the message has its row.
            OutOfMemoryError: If a single row does not fit.
        """
        self.backbone.check_halt(halt)
        self._check_positions(prompts, halt)
        passes = self.backbone.settings.parallel_passes
        if passes and not self.backbone.packable:
            name = type(self.backbone.model).__name__
            raise ConfigurationError(f"parallel_passes={passes}: {name} is read in padded batches, step by step; use parallel_passes=0.")
        job = _Job(prompts, halt, self._shared_prefix(prompts, shared), keep_trajectory, first_row)
        for group in _similar_lengths(job, self.budget.length_ratio):
            yield from self._run_group(job, group)

    def _run_group(self, job: _Job, group: list[int]) -> Iterator[Refined]:
        """Refine one group; when memory runs out, try what is left with half the rows."""
        capacity = job.room(group[0])
        most = max(1, min(self.budget.max_rows, self.budget.batch_tokens // capacity))
        # Waves of equal size, so that the last one is not a handful of rows at a poor rate.
        max_rows = -(-len(group) // -(-len(group) // most))
        left = dict.fromkeys(group)
        while left:
            try:
                for refined in _DecodeBatch(self, job, max_rows, capacity).run(list(left)):
                    for row in refined.index:
                        del left[int(row) - job.first_row]
                    yield refined
            except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if max_rows == 1:
                    row = next(iter(left))
                    raise OutOfMemoryError(
                        f"row {row + job.first_row}: one text of {len(job.prompts[row])} tokens does not fit into memory even alone; "
                        "use a smaller max_length, a smaller model or half precision.",
                        row=row + job.first_row,
                    ) from error
                max_rows //= 2
            # Outside the handler: the exception's frames hold the batch that did not fit.
            if left:
                gc.collect()

    def _shared_prefix(self, prompts: Sequence[TokenIds], shared: int) -> SharedPrefix | None:
        """Return the tokens that all prompts begin with (an instruction, usually), read once: in an earlier call, or now."""
        # In prefix attention the first tokens see the whole prompt, so they cannot be read without it.
        if not (self.backbone.causal and self.backbone.packable and prompts):
            return None
        common = common_prefix(prompts)
        lasting, passing = min(shared, common), common if len(prompts) > 1 else 0
        try:
            if lasting >= self.budget.min_prefix and passing - lasting < self.budget.min_prefix:
                return self.prefixes.get(prompts[0][:lasting])
            return self.prefixes.read(prompts[0][:passing]) if passing >= self.budget.min_prefix else None
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return None  # every row then reads it for itself, in batches that are split until they fit

    def _check_positions(self, prompts: Sequence[TokenIds], halt: HaltingRule) -> None:
        limit = self.backbone.max_positions
        longest = max((len(ids) for ids in prompts), default=0)
        if limit is not None and longest + halt.max_steps > limit:
            raise ConfigurationError(
                f"{longest} prompt tokens and {halt.max_steps} steps need {longest + halt.max_steps} positions, but this model has "
                f"{limit}; use a smaller max_length or fewer steps."
            )


@dataclass(frozen=True)
class _Job:
    """One call of `Engine.run`."""

    prompts: Sequence[TokenIds]
    halt: HaltingRule
    prefix: SharedPrefix | None
    keep_trajectory: bool
    first_row: int

    @property
    def prefix_length(self) -> int:
        """Leading tokens of every prompt that are read already."""
        return self.prefix.length if self.prefix is not None else 0

    def room(self, row: int) -> int:
        """Positions whose keys and values a row needs by itself."""
        return len(self.prompts[row]) - self.prefix_length + self.halt.max_steps


class _DecodeBatch:
    """One decode batch over its life: admit, step, collect."""

    def __init__(self, engine: Engine, job: _Job, max_rows: int, capacity: int) -> None:
        self.backbone, self.budget = engine.backbone, engine.budget
        self.job, self.prompts, self.halt = job, job.prompts, job.halt
        self.max_rows, self.capacity = max_rows, capacity if job.halt.max_steps else 0
        self.passes = self.backbone.settings.parallel_passes if job.halt.max_steps else 0
        self.rows: PackedRows | ParallelRows | CachedRows | None = None
        self.progress: Progress | None = None
        self.log = _StepLog(self.backbone, max_rows, job.halt.max_steps, job.keep_trajectory)

    def run(self, waiting: list[int]) -> Iterator[Refined]:
        """Refine all waiting texts (longest first)."""
        waiting.reverse()
        while waiting or self.progress is not None:
            refined = self._turn(waiting)
            if refined is not None:
                yield refined

    @torch.inference_mode()
    def _turn(self, waiting: list[int]) -> Refined | None:
        """Admit some texts, or refine all rows by one step; return the rows that are finished then."""
        if self._may_admit(len(waiting)):
            self._admit(waiting)
            return self._collect()
        assert self.progress is not None
        assert self.rows is not None
        self.progress, cosine = self._step(self.rows, self.progress)
        self.log.record(self.progress, cosine)
        return self._collect()

    def _step(self, rows: PackedRows | ParallelRows | CachedRows, progress: Progress) -> tuple[Progress, Float[Tensor, "rows"]]:
        if not isinstance(rows, ParallelRows):
            return step(self.backbone, rows, progress)
        rows.advance()
        return self.backbone.settings.pooling.advance(progress, rows.last_hidden)

    def _may_admit(self, waiting: int) -> bool:
        if not waiting:
            return False
        if self.progress is None:
            return True
        # Rows without packing cannot take newcomers. Otherwise admit when a quarter of the places is free, or all that wait fit in:
        # prompts read a few at a time cost more than the places they would fill.
        free = self.max_rows - len(self.progress)
        return self.backbone.packable and free >= min(waiting, max(1, self.max_rows // 4))

    def _admit(self, waiting: list[int]) -> None:
        present = 0 if self.progress is None else len(self.progress)
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
        return PackedRows(self.backbone, max_rows=self.max_rows, max_tokens=self.capacity, prefix=self.job.prefix)

    def _collect(self) -> Refined | None:
        """Take out the rows the rule calls finished, and close the gaps they leave."""
        assert self.progress is not None
        assert self.rows is not None
        # The pool holds max_steps positions: a rule of a user's own that forgets its last step must not run on.
        finished = self.halt(self.progress) | (self.progress.step >= self.halt.max_steps)
        if not bool(finished.any()):
            return None
        refined = self._finish(finished.nonzero()[:, 0])
        keep = surviving_order(finished)
        self.log.select(keep)
        if len(keep) or not isinstance(self.rows, CachedRows):
            self.rows.select(keep)
        self.progress = self.progress.select(keep) if len(keep) else None
        return refined

    def _finish(self, rows: Int[Tensor, "rows"]) -> Refined:
        assert self.progress is not None
        done = self.progress.select(rows)
        vectors, steps = done.embedding.float().cpu().numpy(), done.step.cpu().numpy()
        index = done.index.cpu().numpy()
        sound = np.isfinite(vectors).all(-1) & (np.abs(vectors).max(-1) > 0)
        if not sound.all():
            bad = int((~sound).argmax())
            raise NonFiniteError(
                f"row {index[bad]}: the embedding is not finite or is zero after {steps[bad]} steps; check the model's weights, "
                "or load it with dtype='float32'.",
                row=int(index[bad]),
            )
        stability, trajectory = self.log.of(rows)
        return Refined(index, vectors, steps, stability, trajectory)


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

    def record(self, progress: Progress, cosine: Float[Tensor, "rows"]) -> None:
        """Note s_k and, if wanted, z_k of every row."""
        rows = torch.arange(len(progress), device=cosine.device)
        self.cosines[rows, progress.step - 1] = cosine
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


def _similar_lengths(job: _Job, ratio: float) -> Iterator[list[int]]:
    """Sort texts by falling length and cut them into groups whose rows need similar room."""
    order = sorted(range(len(job.prompts)), key=lambda row: len(job.prompts[row]), reverse=True)
    start = 0
    for place in range(1, len(order) + 1):
        if place == len(order) or job.room(order[start]) > ratio * job.room(order[place]):
            yield order[start:place]
            start = place


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed"))
