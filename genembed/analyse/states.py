"""Texts refined to the end once, with the sums that their embeddings are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from genembed.embedder import Embedder
from genembed.errors import ConfigurationError
from genembed.halting import Progress


@dataclass(frozen=True, eq=False)
class States:
    """What n texts were made of at steps 0 .. K.

        T_k = w p + g_1 + ... + g_k,    z_k = T_k / |T_k|                                  (genembed.pooling.Pooling)

    A unit vector alone does not tell the length of T_k, without which neither g_k nor what is still to come can be estimated.
    """

    totals: Float[np.ndarray, "texts steps_plus_1 hidden"]
    """T_0 .. T_K, float32; T_0 is zero where generated states alone are pooled."""
    prompt_weight: float
    """w, the weight of the prompt's state; 0 where generated states alone are pooled."""
    stability: Float[np.ndarray, "texts steps_minus_1"]
    """s_2 .. s_K, as the engine measured them."""

    @property
    def steps(self) -> int:
        """K."""
        return int(self.totals.shape[1]) - 1

    @property
    def generated(self) -> Float[np.ndarray, "texts steps hidden"]:
        """g_1 .. g_K."""
        return np.diff(self.totals, axis=1)

    @property
    def vectors(self) -> Float[np.ndarray, "texts steps hidden"]:
        """z_1 .. z_K."""
        sums = self.totals[:, 1:]
        return np.asarray(sums / np.linalg.norm(sums, axis=-1, keepdims=True))


def record(model: Embedder, texts: Sequence[str], *, instruction: str | None, steps: int, show_progress_bar: bool = False) -> States:
    """Refine texts to the end with the engine, and keep T_0 .. T_K of each; `4 * hidden * (steps + 1)` bytes a text.

    Args:
        model: A model that pools a mean.
        texts: Texts.
        instruction: Put before each text by the model's template.
        steps: K, at least 2.
        show_progress_bar: Show a bar on stderr.

    Raises:
        ConfigurationError: If the model's embedding is the newest state alone.
    """
    pooling = model.settings.pooling
    if pooling.kind == "last":
        raise ConfigurationError(
            f"{model.source.name} pools 'last', its newest state alone: the analysis asks what averaging does, and needs a model that "
            "pools 'generated' or 'mean'."
        )
    weight = pooling.prompt_weight if pooling.kind == "mean" else float(pooling.pool_prompt_state)
    listener = _Listener(len(texts), steps, model.get_embedding_dimension())
    refined = model.refine(texts, instruction=instruction, halt=listener, show_progress_bar=show_progress_bar)
    return States(listener.totals, weight, refined.stability)


class _Listener:
    """Halts nothing before the last step, and notes what it is shown.

    No rule to serve with: a rule keeps no state. But the engine shows its rule every row after every step, which makes this the one
    place where the sums of the fast loop can be seen without a second loop.
    """

    window = 0

    def __init__(self, texts: int, steps: int, hidden: int) -> None:
        self.max_steps = steps
        self.totals = np.zeros((texts, steps + 1, hidden), dtype=np.float32)

    def __call__(self, progress: Progress) -> Bool[Tensor, "rows"]:
        self.totals[progress.index.cpu().numpy(), progress.step.cpu().numpy()] = progress.total.to(torch.float32).cpu().numpy()
        return progress.step >= self.max_steps
