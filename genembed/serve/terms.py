"""What each text of the running batch was promised: its own halting rule, its own deadline."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from genembed.errors import ConfigurationError
from genembed.halting import ConvergeStop, FixedSteps, Progress

MAX_PATIENCE = 8
"""Stable steps in a row that a request may ask for: so many cosines are kept for every row."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """When one text is finished."""

    rule: FixedSteps | ConvergeStop
    deadline: float = math.inf
    """Time (`time.monotonic`, seconds) after which the best vector there is will do."""

    def __post_init__(self) -> None:
        """Refuse what the batch keeps no memory for."""
        if self.rule.window > MAX_PATIENCE:
            raise ConfigurationError(f"patience={self.rule.window}: at most {MAX_PATIENCE} stable steps in a row can be asked for here.")

    @property
    def has_deadline(self) -> bool:
        """Whether there is a time after which any vector will do."""
        return self.deadline < math.inf

    def halted(self, steps: int, stability: Float[Tensor, "steps_minus_1"]) -> bool:
        """Tell whether the rule itself ended a text after `steps`, of which `stability` has s_2 .. s_K."""
        if steps >= self.rule.max_steps:
            return True
        if isinstance(self.rule, FixedSteps) or steps < max(self.rule.min_steps, self.rule.patience + 1):
            return False
        return bool((stability[steps - 1 - self.rule.patience : steps - 1] >= self.rule.threshold).all())


class TermsOfRows:
    """The halting rule of a batch in which every row has its own; rows are known by their place, `Progress.index`.

    Args:
        places: Rows that can be under way.
        max_steps: The most that any row may be promised.
        first_step: Steps that a row must do, whatever its deadline: 1 where there is no vector before.
        device: Where rows are refined.
    """

    window = MAX_PATIENCE

    def __init__(self, places: int, *, max_steps: int, first_step: int, device: torch.device) -> None:
        self.max_steps = max_steps
        self.first_step = first_step
        self._start = time.monotonic()
        # Seconds of weeks, to the millisecond; not every device has them in float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._threshold, self._deadline = (torch.full((places,), math.inf, dtype=wide, device=device) for _ in range(2))
        self._min_steps, self._max_steps, self._patience = (torch.zeros(places, dtype=torch.long, device=device) for _ in range(3))

    def promise(self, place: int, terms: Terms) -> None:
        """Set what the row at a place is promised."""
        rule = terms.rule
        if isinstance(rule, ConvergeStop):
            self._threshold[place], self._min_steps[place], self._patience[place] = rule.threshold, rule.min_steps, rule.patience
        else:
            self._threshold[place] = math.inf
        self._max_steps[place] = rule.max_steps
        self._deadline[place] = terms.deadline - self._start

    def release(self, place: int) -> None:
        """Let the row at a place go after its next step: nobody waits for it."""
        self._max_steps[place] = 0

    def __call__(self, progress: Progress) -> Bool[Tensor, "rows"]:
        """Tell which rows are finished, each by its own terms."""
        row = progress.index
        counts = torch.arange(MAX_PATIENCE, 0, -1, device=row.device) <= self._patience[row][:, None]
        stable = ((progress.similarity >= self._threshold[row][:, None]) | ~counts).all(-1) & (progress.step >= self._min_steps[row])
        stable &= self._threshold[row] < math.inf
        late = (self._deadline[row] <= time.monotonic() - self._start) & (progress.step >= self.first_step)
        return stable | late | (progress.step >= self._max_steps[row])
