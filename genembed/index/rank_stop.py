"""Progressive search: the index is searched after every step of a query, and the query halts when what it finds is stable."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from genembed.errors import ConfigurationError
from genembed.halting import Progress
from genembed.index import Index


@dataclass(frozen=True)
class _Seen:
    """What a query found at its last step."""

    step: int
    found: tuple[int, ...]
    unchanged: int
    """Steps in a row that found the same as the step before."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankStop:
    """Halt a query when its nearest texts, in their order, have been the same for `patience` steps in a row.

        k* = min{ k : R_k = R_{k-1} = ... = R_{k-patience} },  else max_steps;    R_k: the `hits` nearest texts to z_k

    Unlike the rules of `genembed.halting` it cannot be a function of one step alone: it remembers what each query found at the step
    before. A query that begins anew is forgotten, so one rule may serve many calls; two threads need two.
    """

    index: Index = field(repr=False)
    """What is searched."""
    patience: int = 2
    """How many steps without a change are needed (M)."""
    max_steps: int = 20
    """Every query halts at this step."""
    hits: int = 10
    """How many of the nearest texts are looked at."""
    where: str | None = None
    """Condition of SQL over the index's columns; only texts that meet it are searched."""
    exact: bool = False
    """Compare every vector, also where the index has an approximate index of them."""
    _seen: dict[int, _Seen] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("patience", "max_steps", "hits"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name}={value!r}: an integer of at least 1 is needed.")

    @property
    def window(self) -> int:
        """No cosine is read."""
        return 0

    def __call__(self, progress: Progress) -> Bool[Tensor, "rows"]:
        """Search for every row that has done a step since the last call; finish those whose hits are stable, and those at the end."""
        finished = [
            self._stable(row, step, progress.embedding[place])
            for place, (row, step) in enumerate(zip(progress.index.tolist(), progress.step.tolist(), strict=True))
        ]
        return torch.tensor(finished, dtype=torch.bool, device=progress.step.device) | (progress.step >= self.max_steps)

    def _stable(self, row: int, step: int, embedding: Tensor) -> bool:
        seen = self._seen.get(row)
        if step == 0:
            self._seen.pop(row, None)
            return False
        if seen is None or seen.step != step:  # a finished row may be shown again at the step it stopped at
            found = self.index.nearest(embedding.float().cpu().numpy(), k=self.hits, where=self.where, exact=self.exact)
            follows = seen is not None and seen.step == step - 1 and seen.found == found
            seen = self._seen[row] = _Seen(step, found, seen.unchanged + 1 if follows and seen is not None else 0)
        return seen.unchanged >= self.patience
