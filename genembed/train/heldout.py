"""Quality on held-out pairs while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from genembed.errors import ConfigurationError, NonFiniteError
from genembed.tokens import TokenIds
from genembed.train.collate import PairCollator
from genembed.train.pairs import Pair
from genembed.train.recipe import Evaluation
from genembed.train.trajectories import Trajectories

_TOKENS = 8_192
"""Prompt tokens refined together."""

Refine = Callable[[Sequence[TokenIds], int], Trajectories]
"""From prompts and a number of steps to their vectors."""


@dataclass(frozen=True)
class _Task:
    """Held-out pairs of one file: find each query's positive among all its texts, or rank scored pairs."""

    queries: list[TokenIds]
    candidates: list[TokenIds]
    identities: list[int]
    """Of each candidate: the place of the first one with the same token ids."""
    scores: list[float] | None


class HeldOut:
    """Pairs that are never trained on, by file, and what they say of a model.

    For pairs, nDCG@10 of each query's positive among all positives and negatives of its file, copies of that positive left out;
    for scored pairs, Spearman's correlation of cosine and score; both times 100.

    Args:
        pairs: By the name of their file.
        collator: Makes their prompts. Its recipe must have `instruction_share=1.0`: a held-out pair that has an instruction carries
            it, whatever part of the training batches does, and one prompt stands for each text in every evaluation.
        evaluation: K at which quality is measured.

    Raises:
        ConfigurationError: If no file has two pairs.
    """

    def __init__(self, pairs: Mapping[str, Sequence[Pair]], collator: PairCollator, evaluation: Evaluation) -> None:
        self.steps = evaluation.steps
        self.tasks = {name: _task(list(own), collator) for name, own in pairs.items() if len(own) > 1}
        if not self.tasks:
            raise ConfigurationError(
                f"evaluation: no file has two held-out pairs at share={evaluation.share}; use a larger share, or evaluation=None."
            )

    @property
    def headline(self) -> str:
        """The one number that decides what is best: the mean over files of nDCG@10 or Spearman's correlation at the largest K."""
        return f"mean_k{max(self.steps)}"

    @torch.no_grad()
    def measure(self, refine: Refine) -> dict[str, float]:
        """Return `mean_kK` for every K, and `NAME_kK` of every file at the largest K.

        Args:
            refine: The model.

        Raises:
            NonFiniteError: If a vector is not finite: it has no rank.
        """
        values: dict[int, list[float]] = {k: [] for k in self.steps}
        result: dict[str, float] = {}
        for name, task in self.tasks.items():
            queries, candidates = (self._refined(refine, texts) for texts in (task.queries, task.candidates))
            score = _spearman if task.scores is not None else _ndcg
            for place, k in enumerate(self.steps):
                _check_finite(torch.cat([queries[:, place], candidates[:, place]]), name, k)
                values[k].append(score(queries[:, place], candidates[:, place], task))
            result[f"{name}_k{max(self.steps)}"] = values[max(self.steps)][-1]
        return {**{f"mean_k{k}": float(np.mean(own)) for k, own in values.items()}, **result}

    def _refined(self, refine: Refine, prompts: list[TokenIds]) -> Float[Tensor, "rows chosen hidden"]:
        """Refine all texts and keep z at the chosen K."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        kept: Tensor | None = None
        start = 0
        while start < len(order):
            count = max(1, _TOKENS // (len(prompts[order[min(start + 256, len(order)) - 1]])))
            rows = order[start : start + min(count, 256)]
            refined = refine([prompts[row] for row in rows], max(self.steps))
            every = torch.cat([refined.start[:, None], refined.vectors], dim=1) if max(self.steps) else refined.vectors
            if kept is None:
                kept = torch.empty(len(prompts), len(self.steps), every.shape[-1])
            kept[rows] = every[:, list(self.steps)].float().cpu()
            start += len(rows)
        assert kept is not None  # a task has texts
        return kept


def _task(pairs: list[Pair], collator: PairCollator) -> _Task:
    batch = collator(0, pairs)
    scores = [pair.score for pair in pairs]
    first: dict[tuple[int, ...], int] = {}
    identities = [first.setdefault(tuple(ids.tolist()), place) for place, ids in enumerate(batch.candidates)]
    known = None if scores[0] is None else [score or 0.0 for score in scores]
    return _Task(batch.queries, batch.candidates, identities, known)


def _check_finite(vectors: Float[Tensor, "texts hidden"], name: str, k: int) -> None:
    bad = int((~torch.isfinite(vectors).all(-1)).sum())
    if bad:
        raise NonFiniteError(
            f"{name}: {bad} of {len(vectors)} held-out vectors at K={k} are not finite: the weights have diverged. Train with a smaller "
            "learning rate or a higher temperature, from the last checkpoint that was good."
        )


def _ndcg(queries: Float[Tensor, "queries hidden"], candidates: Float[Tensor, "candidates hidden"], task: _Task) -> float:
    """Return nDCG@10 with one relevant text for each query: 1 / log2(1 + rank), 0 beyond rank 10."""
    scores = queries @ candidates.T
    own = scores.diagonal()[:, None]
    identities = torch.tensor(task.identities)
    first = identities == torch.arange(len(identities))  # a text that several pairs have as a negative is one text
    others = first & (identities != identities[: len(queries), None])  # a positive that two queries share is right for both
    # Texts that tie with the positive stand before it: equal vectors must not count as found.
    ahead = ((scores >= own) & others).sum(1)
    gains = torch.where(ahead < 10, 1 / torch.log2(ahead + 2.0), torch.zeros_like(ahead, dtype=torch.float32))
    return 100 * float(gains.mean())


def _spearman(first: Float[Tensor, "pairs hidden"], second: Float[Tensor, "pairs hidden"], task: _Task) -> float:
    cosines = (first * second).sum(-1).numpy()
    with np.errstate(invalid="ignore"):
        value = np.corrcoef(_ranks(cosines), _ranks(np.asarray(task.scores)))[0, 1]
    return 100 * float(np.nan_to_num(value))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray(last - (counts - 1) / 2)[inverse]
