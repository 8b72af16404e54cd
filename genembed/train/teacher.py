"""Whose in-batch similarities a model is held to."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.checkpoint import load
from genembed.errors import ConfigurationError
from genembed.settings import ModelSettings
from genembed.source import resolve
from genembed.train.trajectories import trajectories


class FrozenTeacher:
    """Another model that embeds the same texts, bare, with its own tokenizer and number of steps."""

    def __init__(self, name: str, settings: ModelSettings | str | None, *, device: str) -> None:
        loaded = load(resolve(name, adapter=None, preset=settings, offline=False), device=device, dtype="float32")
        self.backbone, self.tokenizer = loaded.backbone, loaded.tokenizer

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Float[Tensor, "texts width"]:
        """Return unit vectors."""
        return trajectories(self.backbone, self.tokenizer(texts).ids, steps=self.backbone.settings.halt.max_steps).vectors[:, -1]


def check_own_start(settings: ModelSettings) -> None:
    """Refuse z_0 as a teacher where it does not exist, or is itself in training.

    Raises:
        ConfigurationError: With the settings under which it works.
    """
    if settings.adapter_positions != "generated" or settings.pooling.needs_steps:
        raise ConfigurationError(
            "distillation and false_negative_margin need a teacher that stands still. Without Recipe.teacher that is z_0 of the model "
            "itself, which is frozen with adapter_positions='generated' and a pooling that includes the prompt only; name a teacher."
        )
