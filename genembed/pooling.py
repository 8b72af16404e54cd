"""From hidden states to one unit vector, one state at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from genembed.errors import ConfigurationError
from genembed.halting import NOT_MEASURED, Progress, is_number

PoolingKind = Literal["generated", "last", "mean"]


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """Which hidden states make the embedding, and with which weight.

        z_k = unit( (w p + g_1 + ... + g_k) / (w + k) )               (GIRCSE, section 3.1, equation 4 for w = 0)

    with g_i the state of the i-th generated position, p a summary of the prompt and w its weight:

    - `generated`: w = 0 (GIRCSE); with `pool_prompt_state`, p is the prompt's last state and w = 1 (LaSER).
    - `mean`: p is the mean of the prompt's states and w = `prompt_weight`.
    - `last`: the newest state alone, the prompt's last one before the first step (Causal-EOS).
    """

    kind: PoolingKind = "generated"
    pool_prompt_state: bool = False
    prompt_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values without a meaning or without an effect."""
        if self.kind not in ("generated", "last", "mean"):
            raise ConfigurationError(f"pooling={self.kind!r}: choose generated, last or mean.")
        if self.pool_prompt_state and self.kind != "generated":
            raise ConfigurationError(f"pool_prompt_state=True has no effect with pooling={self.kind!r}; leave it out.")
        if self.prompt_weight != 1.0 and self.kind != "mean":
            raise ConfigurationError(f"prompt_weight={self.prompt_weight} has no effect with pooling={self.kind!r}; leave it out.")
        if self.kind == "mean" and not (is_number(self.prompt_weight) and self.prompt_weight > 0):
            raise ConfigurationError(
                f"prompt_weight={self.prompt_weight!r:.80}: must be positive; for a weight of zero use pooling='generated'."
            )

    @property
    def needs_steps(self) -> bool:
        """Whether there is no embedding before the first refinement step."""
        return self.kind == "generated" and not self.pool_prompt_state

    def start(
        self,
        index: Int[Tensor, "rows"],
        last_state: Float[Tensor, "rows hidden"],
        mean_state: Float[Tensor, "rows hidden"],
        *,
        window: int,
    ) -> Progress:
        """Begin a refinement after the prompt has been read: z_0 where the pooling includes the prompt.

        Args:
            index: Position of each text in the caller's list.
            last_state: Hidden state of the prompt's last token.
            mean_state: Mean hidden state of the prompt's tokens.
            window: How many cosines the halting rule will read.
        """
        rows = index.shape[0]
        state = mean_state if self.kind == "mean" else last_state
        state = state.to(accumulation_dtype(state.dtype))
        weight = {"generated": 1.0 if self.pool_prompt_state else 0.0, "last": 1.0, "mean": self.prompt_weight}[self.kind]
        total = state * weight
        return Progress(
            index=index,
            step=torch.zeros_like(index),
            total=total,
            weight=torch.full((rows,), weight, dtype=state.dtype, device=state.device),
            embedding=unit(total) if weight else torch.zeros_like(total),
            similarity=torch.full((rows, window), NOT_MEASURED, dtype=state.dtype, device=state.device),
        )

    def advance(self, progress: Progress, state: Float[Tensor, "rows hidden"]) -> tuple[Progress, Float[Tensor, "rows"]]:
        """Add one generated state.

        Returns:
            The new progress, and s_k = cos(z_{k-1}, z_k) of each row (-1 at its first step, where eq. 2 defines none).
        """
        state = state.to(progress.total.dtype)
        total, weight = (state, progress.weight) if self.kind == "last" else (progress.total + state, progress.weight + 1)
        embedding = unit(total)
        cosine = (progress.embedding * embedding).sum(-1).masked_fill(progress.step == 0, NOT_MEASURED)
        window = progress.similarity.shape[1]
        similarity = torch.cat([progress.similarity, cosine[:, None]], dim=1)[:, 1:] if window else progress.similarity
        return Progress(progress.index, progress.step + 1, total, weight, embedding, similarity), cosine


def unit(vectors: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
    """Scale each row to length 1 (L2)."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which states are summed: float32 for half precision, otherwise their own."""
    return torch.promote_types(dtype, torch.float32)
