"""All soft tokens at once: guessed, read in one pass, and corrected from what was read. An approximation, for few rows at a time.

Refining a row step by step reads all weights K times, and where rows are few this reading is all the time there is. The sequence of
soft tokens is the fixed point of a map that computes every one of them at once from a guess; Jacobi's iteration finds it, and
after J passes the first J steps are exact, the later ones close (benchmarks/approximations.py measures how close).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from genembed.packed import PackedRows, SharedPrefix
from genembed.tokens import TokenIds

if TYPE_CHECKING:
    from genembed.backbone import Backbone


def states_at_once(backbone: Backbone, rows: PackedRows, *, steps: int, passes: int) -> Float[Tensor, "rows steps hidden"]:
    """Return the states g_1 .. g_K of every row after `passes` corrections of all of them.

        d_1 = soft(h_0),   d_k^(0) = d_1;       g^(j) = f([X; d_1, d_2^(j-1) .. d_K^(j-1)]),   d_(k+1)^(j) = soft(g_k^(j))

    Args:
        backbone: The model.
        rows: Prompts that have been read; nothing is added to them.
        steps: K >= 1.
        passes: J >= 1; the first J states are exact.
    """
    first = backbone.next_embeddings(rows.last_hidden)[:, None]
    guess, states = first.expand(-1, steps, -1), rows.read_ahead(first.expand(-1, steps, -1))
    for _ in range(1, min(passes, steps)):
        corrected = backbone.next_embeddings(states[:, :-1].flatten(0, 1)).unflatten(0, (len(rows), steps - 1))
        guess = torch.cat([first, corrected], dim=1)
        states = rows.read_ahead(guess)
    return states


class ParallelRows:
    """Rows whose generated states are all known as soon as the prompts have been read; a step only looks at the next one.

    Rows may halt, leave and be replaced as in `PackedRows`: a halting rule reads the same trajectory, and its vector is z_{k*}.

    Args:
        backbone: The model.
        steps: Generated states of each row.
        passes: Passes over all of them.
        prefix: Keys and values that every row sees first.
    """

    def __init__(self, backbone: Backbone, *, steps: int, passes: int, prefix: SharedPrefix | None = None) -> None:
        self.backbone = backbone
        self.steps = steps
        self.passes = passes
        self.prefix = prefix
        nothing = torch.zeros(0, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
        self.last_hidden: Float[Tensor, "rows hidden"] = nothing
        self.mean_hidden: Float[Tensor, "new_rows hidden"] = nothing
        self._states: Float[Tensor, "rows steps hidden"] = nothing[:, None].expand(-1, steps, -1)
        self._next: Int[Tensor, "rows"] = torch.zeros(0, dtype=torch.long, device=backbone.device)

    def admit(self, prompts: Sequence[TokenIds]) -> None:
        """Read prompts and all that is generated after them; afterwards `mean_hidden` has the mean prompt state of the new rows."""
        read = self.prefix.length if self.prefix is not None else 0
        longest = max(len(ids) for ids in prompts) - read
        rows = PackedRows(self.backbone, max_rows=len(prompts), max_tokens=longest, prefix=self.prefix)
        rows.admit(prompts)
        states = states_at_once(self.backbone, rows, steps=self.steps, passes=self.passes)
        self.mean_hidden = rows.mean_hidden
        self.last_hidden = torch.cat([self.last_hidden, rows.last_hidden])
        self._states = torch.cat([self._states, states])
        self._next = torch.cat([self._next, torch.zeros(len(prompts), dtype=torch.long, device=self._next.device)])

    def generate(self) -> None:
        """Move every row to its next generated state, which is known."""
        self.last_hidden = self._states[torch.arange(len(self._next), device=self._next.device), self._next]
        self._next = self._next + 1

    def select(self, keep: Int[Tensor, "kept"]) -> None:
        """Keep only the rows `keep`, in that order."""
        self.last_hidden, self._states, self._next = self.last_hidden[keep], self._states[keep], self._next[keep]
