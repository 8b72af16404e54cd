"""Quality as a function of K: every text is refined once, every z_k is kept, and any choice of one vector for each is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from genembed import Embedder, FixedSteps
from genembed.calibrate.replay import halting_steps
from genembed.halting import HaltingRule

STEPS = 20

Curve = np.ndarray
"""Vectors of one set of texts at K = 0 .. 20: [texts, 21, hidden]; a one-pass model has K = 0 alone, and where generated states alone
are pooled K = 0 is NaN."""


def curve_of(model: Embedder, texts: list[str], *, instruction: str | None = None) -> Curve:
    """Embed texts once and keep every z_k, z_0 included."""
    if model.settings.pooling.needs_steps:
        start = np.full((len(texts), model.get_embedding_dimension()), np.nan, dtype=np.float32)
    else:
        start = model.refine(texts, instruction=instruction, halt=FixedSteps(0)).vectors
    if not model.settings.halt.max_steps:
        return start[:, None]
    trajectory = model.refine(texts, instruction=instruction, halt=FixedSteps(STEPS), keep_trajectory=True).trajectory
    assert trajectory is not None
    return np.concatenate([start[:, None], trajectory], axis=1)


def stability_of(curve: Curve) -> np.ndarray:
    """Return s_2 .. s_K of every text."""
    stability: np.ndarray = np.einsum("tkd,tkd->tk", curve[:, 1:-1], curve[:, 2:])
    return stability


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Texts by their role, and a score for any choice of one vector for each."""

    name: str
    texts: dict[str, list[str]]
    score: Callable[[dict[str, np.ndarray]], float] = field(repr=False)

    def embed(self, model: Embedder) -> Curves:
        """Refine all texts with a model."""
        return Curves(self, {role: curve_of(model, values) for role, values in self.texts.items()})


@dataclass(frozen=True, eq=False)
class Curves:
    """A set refined by one model."""

    of: EvaluationSet
    vectors: dict[str, Curve]

    def at(self, steps: int) -> float:
        """Score at a fixed K."""
        return self.of.score({role: curve[:, steps] for role, curve in self.vectors.items()})

    def halted(self, rule: HaltingRule) -> tuple[float, float]:
        """Score under a halting rule, and its mean k*."""
        chosen, counts = {}, []
        for role, curve in self.vectors.items():
            steps = halting_steps(stability_of(curve), rule)
            chosen[role] = curve[np.arange(len(curve)), steps]
            counts.append(steps)
        return self.of.score(chosen), float(np.concatenate(counts).mean())
