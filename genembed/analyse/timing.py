"""Seconds on the clock: refining to the end and halting, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from genembed.embedder import Embedder
from genembed.halting import FixedSteps, HaltingRule


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """What texts took, medians over the repeats."""

    texts: int
    full: float
    """Seconds for K steps of all texts."""
    halted: float
    """Seconds under the rule."""
    spread: float
    """Largest less smallest of the seconds for K steps."""
    steps: float
    """Mean k*."""
    max_steps: int
    """K."""
    prefill: float
    """Seconds for reading all prompts: those of one step less a step's."""
    step: float
    """Seconds for one step of all texts: (seconds of K steps - seconds of one step) / (K - 1)."""

    @property
    def saving(self) -> float:
        """Share of the seconds saved."""
        return 1 - self.halted / self.full

    @property
    def iteration_saving(self) -> float:
        """Share of the steps saved."""
        return 1 - self.steps / self.max_steps

    @property
    def ceiling(self) -> float:
        """Share that could be saved: 1 - (prefill + k* step) / (prefill + K step). Prompts are read whatever the rule does."""
        return 1 - (self.prefill + self.steps * self.step) / (self.prefill + self.max_steps * self.step)


def seconds(model: Embedder, texts: Sequence[str], rule: HaltingRule, *, instruction: str | None, steps: int, repeats: int) -> Seconds:
    """Refine texts to the end, under the rule, and for one step, in turns, so that a busy machine is busy for all of them.

    Args:
        model: The model, which has worked before: nothing is warmed up here.
        texts: Texts.
        rule: When to halt.
        instruction: Put before each text.
        steps: K.
        repeats: Turns, at least 1.
    """
    rules: dict[str, HaltingRule] = {"full": FixedSteps(steps), "halted": rule, "one": FixedSteps(1)}
    taken: dict[str, list[float]] = {name: [] for name in rules}
    mean = 0.0
    for _ in range(repeats):
        for name, own in rules.items():
            start = time.perf_counter()
            result = model.refine(texts, instruction=instruction, halt=own)
            taken[name].append(time.perf_counter() - start)
            mean = float(result.steps.mean()) if name == "halted" else mean
    full, one = median(taken["full"]), median(taken["one"])
    step = max((full - one) / (steps - 1), 0.0)
    return Seconds(
        texts=len(texts),
        full=full,
        halted=median(taken["halted"]),
        spread=max(taken["full"]) - min(taken["full"]),
        steps=mean,
        max_steps=steps,
        prefill=max(one - step, 0.0),
        step=step,
    )
