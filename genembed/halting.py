"""When a text has been refined enough: the memory of a refinement, and the rules that read it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from genembed.errors import ConfigurationError

MOST_STEPS = 10_000
"""More steps, of a text or stable ones in a row, are a slip or meant to harm: a settings file could keep a machine busy for days."""

NOT_MEASURED = -1.0
"""Stands in `Progress.similarity` for a cosine that does not exist yet; below any useful threshold."""


@dataclass(eq=False)
class Progress:
    """What each row remembers of its refinement; everything a halting rule may look at.

    It travels with its row: `select` and `extend` are called whenever rows leave or enter the batch, so a rule
    needs no state of its own.
    """

    index: Int[Tensor, "rows"]
    """Position of the row's text in the caller's list."""
    step: Int[Tensor, "rows"]
    """Refinement steps done, k."""
    total: Float[Tensor, "rows hidden"]
    """Weighted sum of the pooled hidden states, at least float32."""
    weight: Float[Tensor, "rows"]
    """Sum of the weights in `total`; 0 while nothing has been pooled."""
    embedding: Float[Tensor, "rows hidden"]
    """Unit vector z_k; zeros while nothing has been pooled."""
    similarity: Float[Tensor, "rows window"]
    """The last cosines s_k = cos(z_{k-1}, z_k), newest last; -1 where not yet measured."""

    def __len__(self) -> int:
        """Number of rows."""
        return self.index.shape[0]

    def select(self, keep: Int[Tensor, "kept"]) -> Progress:
        """Return the rows `keep`, in that order."""
        return Progress(*(getattr(self, name).index_select(0, keep) for name in _FIELDS))

    def hold(self, rows: Bool[Tensor, "rows"], before: Progress) -> Progress:
        """Return these rows, but `rows` as they were."""

        def held(name: str) -> Tensor:
            new = getattr(self, name)
            return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), getattr(before, name), new)

        return Progress(*(held(name) for name in _FIELDS))

    def extend(self, other: Progress) -> Progress:
        """Return these rows followed by the rows of `other`."""
        return Progress(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in _FIELDS))


_FIELDS = ("index", "step", "total", "weight", "embedding", "similarity")


@runtime_checkable
class HaltingRule(Protocol):
    """A pure function from progress to the rows that are finished.

    A rule is a frozen value: it prints as it is made, compares by value, and keeps no state between calls.
    """

    @property
    def max_steps(self) -> int:
        """The number of steps after which every row is finished."""

    @property
    def window(self) -> int:
        """How many of the newest cosines the rule reads from `Progress.similarity`."""

    def __call__(self, progress: Progress) -> Bool[Tensor, "rows"]:
        """Tell which rows are finished."""


@dataclass(frozen=True)
class FixedSteps:
    """Refine every text exactly `steps` times; 0 gives the one-pass embedding where the pooling includes the prompt."""

    steps: int

    def __post_init__(self) -> None:
        """Check the value."""
        if not _is_int(self.steps) or not 0 <= self.steps <= MOST_STEPS:
            raise ConfigurationError(
                f"FixedSteps(steps={self.steps!r:.80}): the number of steps must be an integer of at least 0, and at most {MOST_STEPS}."
            )

    @property
    def max_steps(self) -> int:
        """The number of steps itself."""
        return self.steps

    @property
    def window(self) -> int:
        """No cosine is read."""
        return 0

    def __call__(self, progress: Progress) -> Bool[Tensor, "rows"]:
        """Finish every row that has done all its steps."""
        return progress.step >= self.steps


@dataclass(frozen=True)
class ConvergeStop:
    """Halt a text when its embedding has stopped moving for `patience` steps in a row.

        k* = min{ k >= min_steps : s_k, s_{k-1}, ..., s_{k-patience+1} all >= threshold },  else max_steps
        s_k = cos(z_{k-1}, z_k),  k >= 2                               (ConvergeStop, section 3.3, equation 2)

    Stability is not quality: calibrate the threshold on your own data.

    Args:
        threshold: The cosine above which a step counts as stable, in (-1, 1]. Above 1 nothing ever counts.
        patience: How many stable steps in a row are needed (M in the paper).
        min_steps: No text halts before this step (k_min).
        max_steps: Every text halts at this step (K_max).
    """

    threshold: float
    patience: int = 2
    min_steps: int = 1
    max_steps: int = 20

    def __post_init__(self) -> None:
        """Check the values."""
        if not is_number(self.threshold) or not self.threshold > NOT_MEASURED:
            raise ConfigurationError(f"threshold={self.threshold!r:.80}: a cosine above -1 is needed, for example 0.998.")
        for name in ("patience", "min_steps", "max_steps"):
            if not _is_int(getattr(self, name)) or not 1 <= getattr(self, name) <= MOST_STEPS:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r:.80}: an integer of at least 1 is needed, and at most {MOST_STEPS}."
                )
        if self.min_steps > self.max_steps:
            raise ConfigurationError(
                f"min_steps={self.min_steps} is above max_steps={self.max_steps}: no text could ever halt by the rule."
            )

    @property
    def window(self) -> int:
        """The rule reads as many cosines as its patience."""
        return self.patience

    def __call__(self, progress: Progress) -> Bool[Tensor, "rows"]:
        """Finish rows that were stable for `patience` steps, and rows that have done `max_steps`."""
        stable = (progress.similarity[:, -self.patience :] >= self.threshold).all(-1)
        return (stable & (progress.step >= self.min_steps)) | (progress.step >= self.max_steps)


_RULES: Mapping[str, type[FixedSteps] | type[ConvergeStop]] = {rule.__name__: rule for rule in (FixedSteps, ConvergeStop)}


def rule_to_json(rule: FixedSteps | ConvergeStop) -> dict[str, Any]:
    """Write a rule as the object that `rule_from_json` reads."""
    return {"rule": type(rule).__name__, **asdict(rule)}


def rule_from_json(value: Mapping[str, Any]) -> FixedSteps | ConvergeStop:
    """Read a rule from a settings file.

    Raises:
        ConfigurationError: If the rule or one of its fields is unknown.
    """
    name, fields = str(value.get("rule")), {key: field for key, field in value.items() if key != "rule"}
    if name not in _RULES:
        raise ConfigurationError(f"halting rule {name!r} is unknown; known rules: {', '.join(_RULES)}.")
    try:
        return _RULES[name](**fields)
    except TypeError as error:
        raise ConfigurationError(f"halting rule {name}: {error}") from None


def is_number(value: object) -> bool:
    """Whether a value of a settings file is a number that a float can hold; JSON knows whole ones of thousands of digits."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
