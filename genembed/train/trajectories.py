"""Refinement with gradients: what the training objective is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.backbone import Backbone
from genembed.errors import ConfigurationError
from genembed.halting import FixedSteps
from genembed.refine import step
from genembed.tokens import TokenIds
from genembed.train.rows import TrainingRows


class Trajectories(NamedTuple):
    """Refined texts of one batch."""

    vectors: Float[Tensor, "rows steps hidden"]
    """Unit vectors z_1 .. z_K, or z_0 alone for a one-pass model."""
    start: Float[Tensor, "rows hidden"]
    """Unit vector z_0; zeros where the pooling leaves the prompt out."""


def trajectories(backbone: Backbone, prompts: Sequence[TokenIds], *, steps: int) -> Trajectories:
    """Refine all texts of a batch together, with gradients: one pass over the prompts and `steps` passes over one position.

    Values and gradients are those of `refine`, at a fraction of its time and memory.

    Args:
        backbone: The model.
        prompts: Token ids of each text, at least one token.
        steps: Refinement steps, K; 0 for one-pass models.

    Raises:
        ConfigurationError: If there is no text, the model cannot generate, or has nothing to pool at `steps`.
    """
    if not prompts:
        raise ConfigurationError("an empty batch cannot be refined.")
    backbone.check_halt(FixedSteps(steps))
    rows = TrainingRows(backbone, prompts)
    index = torch.arange(len(prompts), device=backbone.device)
    progress = backbone.settings.pooling.start(index, rows.last_hidden, rows.mean_hidden, window=0)
    start = progress.embedding
    if not steps:
        return Trajectories(torch.stack([start], dim=1), start)  # a view would be no output of its own to FSDP
    vectors = []
    for _ in range(steps):
        progress, _cosine = step(backbone, rows, progress)
        vectors.append(progress.embedding)
    return Trajectories(torch.stack(vectors, dim=1), start)
