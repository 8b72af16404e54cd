"""The loops that are timed, and the prompts they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from genembed import Progress
from genembed.backbone import Backbone
from genembed.engine import Engine
from genembed.refine import step
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch, TokenIds

STEPS = 20
BATCH = 32
"""Batch of the plain loop, as the released evaluation uses."""
KINDS = {"queries": (20, 8), "documents-128": (128, 50), "documents": (200, 80), "documents-512": (512, 200)}
"""Mean and standard deviation of the prompt tokens."""


@dataclass(frozen=True)
class RecordedSteps:
    """Halts every text at a step that was fixed beforehand: a double for a rule whose outcome is known."""

    steps: Tensor
    max_steps: int = STEPS
    window: int = 0

    def __call__(self, progress: Progress) -> Bool[Tensor, "rows"]:
        """Finish a text at its recorded step."""
        return progress.step >= self.steps[progress.index]


@torch.inference_mode()
def plain_loop(backbone: Backbone, prompts: Sequence[TokenIds], *, improved: bool) -> int:
    """Run the paper's algorithm on padded batches.

    Args:
        backbone: The model.
        prompts: Texts in the given order.
        improved: Sort by length and take logits at the last position only.

    Returns:
        Steps done, over all texts.
    """
    order = sorted(prompts, key=len) if improved else list(prompts)
    for start in range(0, len(order), BATCH):
        batch = TokenBatch.pad(order[start : start + BATCH])
        rows = CachedRows(backbone, batch)
        if not improved:
            states = torch.zeros(*batch.input_ids.shape, backbone.hidden_size, dtype=backbone.dtype)
            backbone.head(states)
        progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
        for _ in range(STEPS):
            if improved:
                progress, _cosine = step(backbone, rows, progress)
            else:
                probabilities = torch.softmax(backbone.head(rows.last_hidden) / backbone.settings.temperature, dim=-1)
                rows.append(probabilities @ backbone.spoken)
                progress, _cosine = backbone.settings.pooling.advance(progress, rows.last_hidden)
    return STEPS * len(order)


def engine_loop(engine: Engine, prompts: Sequence[TokenIds], halt: Any) -> int:
    """Run our engine; return the steps done."""
    return int(sum(done.steps.sum() for done in engine.run(prompts, halt)))


def prompts_of(kind: str, count: int, vocab: int, limit: int) -> list[TokenIds]:
    """Draw prompts whose lengths are spread as real ones are; none is longer than `limit`."""
    rng = np.random.default_rng(0)
    mean, spread = KINDS[kind]
    lengths = np.clip(rng.normal(mean, spread, count).round(), 4, limit).astype(int)
    return [rng.integers(5, vocab, size=length) for length in lengths]
