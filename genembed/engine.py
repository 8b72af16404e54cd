"""The fast loop over many texts: groups of similar length, decode batches that fit, and what every prompt begins with read once."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch

from genembed.backbone import Backbone
from genembed.budget import DEFAULT_BUDGET, Budget
from genembed.decode import DecodeBatch, Job, Refined
from genembed.errors import ConfigurationError, OutOfMemoryError
from genembed.graphs import RowsCache, cuda_graph
from genembed.halting import HaltingRule
from genembed.native import NativeError
from genembed.native_step import NativeRows
from genembed.packed import PrefixCache, SharedPrefix
from genembed.tokens import TokenIds, common_prefix


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
        self.kept, self._not_native = _rows_source(backbone, budget)
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
        job = Job(prompts, halt, self._shared_prefix(prompts, shared), keep_trajectory, first_row)
        for group in _similar_lengths(job, self.budget.length_ratio):
            yield from self._run_group(job, group)

    @property
    def done_in_c(self) -> str:
        """What of a step is done in C (`Budget.native`), and why not the rest."""
        if not isinstance(self.kept, NativeRows):
            return f"nothing: {self._not_native}"
        return "steps of few rows, attention of all" if self.kept.reason is None else f"attention: {self.kept.reason}"

    def _run_group(self, job: Job, group: list[int]) -> Iterator[Refined]:
        """Refine one group; when memory runs out, try what is left with half the rows."""
        capacity = job.room(group[0])
        most = max(1, min(self.budget.max_rows, self.budget.batch_tokens // capacity))
        # Waves of equal size, so that the last one is not a handful of rows at a poor rate.
        max_rows = -(-len(group) // -(-len(group) // most))
        left = dict.fromkeys(group)
        while left:
            try:
                # No name for the batch: it would outlive the attempt, with its memory.
                for refined in self._batch(job, max_rows, capacity).run(list(left)):
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
                if self.kept is not None:
                    self.kept.clear()
                gc.collect()

    def _batch(self, job: Job, max_rows: int, capacity: int) -> DecodeBatch:
        return DecodeBatch(self.backbone, self.budget, job, max_rows=max_rows, capacity=capacity, kept=self.kept)

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


def _rows_source(backbone: Backbone, budget: Budget) -> tuple[RowsCache | NativeRows | None, str]:
    """Return what makes the rows of decode batches faster on this device, None for the plain ones; and why nothing is done in C."""
    if budget.native is False or (backbone.device.type == "cuda" and budget.native is None):
        records = backbone.device.type == "cuda" and budget.record_steps and backbone.packable
        return RowsCache(backbone, record=cuda_graph) if records else None, "on cuda" if budget.native is None else "Budget(native=False)"
    try:
        return NativeRows(backbone), ""
    except NativeError as error:
        if budget.native:
            raise ConfigurationError(f"native=True: {error}") from error
        return None, str(error)


def _similar_lengths(job: Job, ratio: float) -> Iterator[list[int]]:
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
