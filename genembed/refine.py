"""The method: one refinement step, and the loop that repeats it. Slow, obvious, differentiable."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.backbone import Backbone
from genembed.errors import ConfigurationError
from genembed.halting import FixedSteps, Progress
from genembed.rows import CachedRows, RecomputedRows, Rows
from genembed.tokens import TokenBatch


def step(backbone: Backbone, rows: Rows, progress: Progress) -> tuple[Progress, Float[Tensor, "rows"]]:
    """Refine every row once: soft token from the last hidden state, append it, update the pooled embedding.

        d_k = softmax(W h_{k-1} / T) @ E,   g_k = f([X; d_1 .. d_k])_last,   z_k = pool(g_1 .. g_k)      (GIRCSE, algorithm 1)

    Returns:
        The new progress, and the cosine s_k of each row.
    """
    rows.generate()
    return backbone.settings.pooling.advance(progress, rows.last_hidden)


def refine(
    backbone: Backbone,
    batch: TokenBatch,
    *,
    steps: int,
    cached: bool = True,
) -> Float[Tensor, "rows steps hidden"]:
    """Refine a padded batch for a fixed number of steps: the loop that every faster one must agree with.

    Args:
        backbone: The model.
        batch: Prompts, padded on either side.
        steps: Refinement steps, K >= 1.
        cached: Read each new position through a KV cache; otherwise read the whole sequence again at every step. Both
            give the same values and gradients.

    Returns:
        Unit vectors z_1 .. z_K of each row.

    Raises:
        ConfigurationError: If `steps` is below 1, or the model cannot generate.
    """
    if steps < 1:
        raise ConfigurationError(f"steps={steps}: at least one refinement step is needed.")
    backbone.check_halt(FixedSteps(steps))
    rows: CachedRows | RecomputedRows = CachedRows(backbone, batch) if cached else RecomputedRows(backbone, batch)
    progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
    trajectory = []
    for _ in range(steps):
        progress, _cosine = step(backbone, rows, progress)
        trajectory.append(progress.embedding)
    return torch.stack(trajectory, dim=1)
