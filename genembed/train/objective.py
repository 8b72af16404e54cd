"""The training objective as a value: equations 7 and 8 of GIRCSE, and what can be added to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from genembed.errors import ConfigurationError
from genembed.train.losses import (
    false_negatives,
    refinement_regulariser,
    similarity_distillation,
    stepwise_contrastive,
    stepwise_ranking,
)

StepLoss = Callable[[Tensor, Tensor], Tensor]
"""From the trajectories of queries and candidates to a loss for each step."""

StepMean = Callable[[Tensor], Tensor]
"""From the step losses of a part of a batch to those of the whole."""


@dataclass(frozen=True)
class Part:
    """What a batch is of a larger one, whose loss is the mean of its parts' losses."""

    share: float
    """Queries of this part, over the mean of all parts: a part with more of them counts for more."""
    joined: StepMean | None
    """Makes the mean of the step losses over all parts. The regulariser is not linear in them, so the mean of the parts' own would be
    another one."""


WHOLE = Part(1.0, None)
"""A batch by itself."""

_WEIGHTED = ("regulariser", "distillation", "self_distillation")
"""Terms beside the step losses; a setting of the same name is the weight."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """Embeddings of one batch by a frozen model; of a model with an adapter, z_0 of its base. They get no gradient."""

    queries: Float[Tensor, "queries width"]
    """Of each query, of any length and width."""
    candidates: Float[Tensor, "candidates width"]
    """Of each candidate."""


@dataclass(frozen=True, eq=False)
class ObjectiveValue:
    """What the objective makes of one batch."""

    total: Float[Tensor, ""]
    """The loss to minimise; it carries the gradient."""
    parts: dict[str, Tensor]
    """For the log, without gradient and before its weight, 0 where switched off: `step_losses` (L_1 .. L_K, also of the steps that
    are not trained), `regulariser`, `distillation`, `self_distillation`."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Settings of the training loss; called with the trajectories of a batch, it gives the loss.

        L = reduce_k(L_k + distillation * KL(P || P_k)) + regulariser * L_reg + self_distillation * KL(P_K || P_s)

    with L_k and L_reg of GIRCSE's equations 7 and 8, P_k the in-batch similarity distribution at step k, P that of a teacher and s
    the step that self-distillation trains. The rows of the paper's table 3:

    | row           | settings                          | trajectories                                      |
    |---------------|-----------------------------------|---------------------------------------------------|
    | none          | `stepwise=False, regulariser=0.0` | one step: a one-pass model, under `FixedSteps(0)` |
    | Gen           | `stepwise=False, regulariser=0.0` | z_1 .. z_K                                        |
    | Gen + SL      | `regulariser=0.0`                 | z_1 .. z_K                                        |
    | Gen + SL + IR | as they are                       | z_1 .. z_K                                        |
    """

    temperature: float = 0.02
    """tau of the contrastive or ranking loss, dimensionless, > 0."""
    stepwise: bool = True
    """Whether every step is trained; otherwise the last one alone."""
    reduction: Literal["sum", "mean"] = "mean"
    """Over the steps: the mean is the released code's, the sum is equation 7's."""
    regulariser: float = 1.0
    """lambda of GIRCSE, section 3.3: weight of the penalty for steps that get worse; 0 switches it off."""
    false_negative_margin: float | None = None
    """Leave out candidates whose cosine to the query, in the teacher's eyes, is at least its positive's less this
    margin, in (-2, 2). Scored pairs know no such candidates."""
    dimensions: tuple[int, ...] = ()
    """Matryoshka: the objective is the mean over these numbers of leading dimensions. Empty: the full width alone."""
    distillation: float = 0.0
    """Weight of the distance from the teacher's in-batch similarities; 0 switches it off."""
    distillation_temperature: float | None = None
    """tau of both distillations' distributions; None: `temperature`."""
    self_distillation: float = 0.0
    """Weight of the distance of an early step's in-batch similarities from the last step's; 0 switches it off."""
    self_distillation_step: int = 5
    """The step that learns from the last one, counted from 1; a trajectory that is not longer has nothing to distil."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning or without an effect."""
        if self.reduction not in ("sum", "mean"):
            raise ConfigurationError(f"reduction={self.reduction!r}: choose sum or mean.")
        if not 0 < self.temperature < math.inf:
            raise ConfigurationError(f"temperature={self.temperature!r}: must be positive, for example 0.02.")
        if not 0 < self._distillation_temperature < math.inf:
            raise ConfigurationError(f"distillation_temperature={self.distillation_temperature!r}: must be positive, or None.")
        for name in _WEIGHTED:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: a weight of at least 0 is needed; 0 switches it off.")
        if self.false_negative_margin is not None and not -2 < self.false_negative_margin < 2:
            raise ConfigurationError(
                f"false_negative_margin={self.false_negative_margin!r}: two cosines differ by less than 2; for no mask leave it out."
            )
        self._check_integers()
        self._check_effects()

    def __call__(
        self,
        queries: Float[Tensor, "queries steps hidden"],
        candidates: Float[Tensor, "candidates steps hidden"],
        *,
        positives: Int[Tensor, "queries"] | None = None,
        ignore: Bool[Tensor, "queries candidates"] | None = None,
        scores: Float[Tensor, "queries"] | None = None,
        teacher: Teacher | None = None,
        part: Part = WHOLE,
    ) -> ObjectiveValue:
        """Return the loss of one batch, and its parts.

        Args:
            queries: Trajectories z_1 .. z_K of the queries; of a one-pass model its embedding as the only step.
            candidates: Trajectories of all texts they are compared with, positives and negatives.
            positives: For each query, the position of its positive among the candidates: contrastive loss.
            ignore: With positives, True where a candidate is known to be right for a query too and must not count against it.
            scores: The similarity of queries[i] and candidates[i], instead of positives: ranking loss.
            teacher: A frozen model's embeddings of the same batch, where `needs_teacher`.
            part: What of a larger batch this one is.

        Raises:
            ConfigurationError: If the arguments do not fit one another or these settings.
        """
        self._check_batch(queries, candidates, scores, teacher)
        step_loss = self._step_loss(positives, ignore, scores, teacher)
        widths = self.dimensions or (queries.shape[-1],)
        terms = [self._terms(queries[..., :width], candidates[..., :width], step_loss, teacher, part) for width in widths]
        parts = {name: torch.stack([term[name] for term in terms]).mean(dim=0) for name in terms[0]}
        total = self._reduce(parts["step_losses"])
        for name in _WEIGHTED:
            total = total + getattr(self, name) * parts[name]
        return ObjectiveValue(total, {name: part.detach() for name, part in parts.items()})

    @property
    def needs_teacher(self) -> bool:
        """Whether every batch must come with a teacher's embeddings."""
        return self.distillation > 0 or self.false_negative_margin is not None

    @property
    def _distillation_temperature(self) -> float:
        return self.temperature if self.distillation_temperature is None else self.distillation_temperature

    def _check_integers(self) -> None:
        if not all(_is_count(width) for width in self.dimensions) or len(set(self.dimensions)) < len(self.dimensions):
            raise ConfigurationError(f"dimensions={self.dimensions!r}: different integers of at least 1 are needed, for example (64, 256).")
        if not _is_count(self.self_distillation_step):
            raise ConfigurationError(f"self_distillation_step={self.self_distillation_step!r}: an integer of at least 1 is needed.")

    def _check_effects(self) -> None:
        if not self.stepwise and self.regulariser:
            raise ConfigurationError(
                f"regulariser={self.regulariser} compares the steps, but stepwise=False trains the last one alone: "
                "give regulariser=0.0 with it."
            )
        if not self.stepwise and self.reduction != "mean":
            raise ConfigurationError(f"reduction={self.reduction!r} has no effect with stepwise=False; leave it out.")
        if self.distillation_temperature is not None and not (self.distillation or self.self_distillation):
            raise ConfigurationError(
                f"distillation_temperature={self.distillation_temperature} has no effect without distillation or self_distillation."
            )
        if self.self_distillation_step != Objective.self_distillation_step and not self.self_distillation:
            raise ConfigurationError(f"self_distillation_step={self.self_distillation_step} has no effect without self_distillation.")

    def _check_batch(self, queries: Tensor, candidates: Tensor, scores: Tensor | None, teacher: Teacher | None) -> None:
        if queries.shape[1:] != candidates.shape[1:]:
            raise ConfigurationError(
                f"queries have {tuple(queries.shape[1:])} steps and dimensions, candidates {tuple(candidates.shape[1:])}: both must agree."
            )
        if max(self.dimensions, default=1) > queries.shape[-1]:
            raise ConfigurationError(f"dimensions={self.dimensions}: the embeddings have {queries.shape[-1]} dimensions only.")
        if scores is not None and not len(scores) == len(queries) == len(candidates):
            raise ConfigurationError(
                f"{len(scores)} scores, {len(queries)} queries and {len(candidates)} candidates: each score needs its own two texts."
            )
        if teacher is not None and not self.needs_teacher:
            raise ConfigurationError("teacher has no effect without distillation or false_negative_margin; leave it out.")
        if teacher is not None and (len(teacher.queries), len(teacher.candidates)) != (len(queries), len(candidates)):
            raise ConfigurationError(
                f"the teacher has {len(teacher.queries)} queries and {len(teacher.candidates)} candidates, "
                f"the batch {len(queries)} and {len(candidates)}: give it the same texts."
            )

    def _step_loss(self, positives: Tensor | None, ignore: Tensor | None, scores: Tensor | None, teacher: Teacher | None) -> StepLoss:
        """Bind what is known about the texts of this batch."""
        if positives is not None and scores is None:
            return self._contrastive(positives, ignore, teacher)
        if scores is not None and positives is None:
            if ignore is not None:
                raise ConfigurationError("ignore has no effect on scored pairs, which are compared with each other alone; leave it out.")
            return self._ranking(scores)
        raise ConfigurationError("give either positives, for the contrastive loss, or scores, for the ranking loss.")

    def _contrastive(self, positives: Tensor, ignore: Tensor | None, teacher: Teacher | None) -> StepLoss:
        if self.false_negative_margin is not None:
            base = _required(teacher)
            likely = false_negatives(base.queries, base.candidates, positives, margin=self.false_negative_margin)
            ignore = likely if ignore is None else ignore | likely
        return partial(stepwise_contrastive, temperature=self.temperature, positives=positives, ignore=ignore)

    def _ranking(self, scores: Tensor) -> StepLoss:
        if self.false_negative_margin is not None:
            raise ConfigurationError(
                f"false_negative_margin={self.false_negative_margin} has no effect on scored pairs: "
                "for these use dataclasses.replace(objective, false_negative_margin=None)."
            )
        return partial(stepwise_ranking, temperature=self.temperature, scores=scores)

    def _terms(self, queries: Tensor, candidates: Tensor, step_loss: StepLoss, teacher: Teacher | None, part: Part) -> dict[str, Tensor]:
        """Compute every term that is on, before its weight."""
        losses = part.share * step_loss(queries, candidates)
        terms = {"step_losses": losses, **dict.fromkeys(_WEIGHTED, losses.new_zeros(()))}
        distil = partial(similarity_distillation, temperature=self._distillation_temperature)
        if self.regulariser:
            terms["regulariser"] = refinement_regulariser(losses if part.joined is None else part.joined(losses))
        if self.distillation:
            frozen = _required(teacher)
            terms["distillation"] = part.share * self._reduce(distil(queries, candidates, frozen.queries, frozen.candidates))
        step = self.self_distillation_step
        if self.self_distillation and queries.shape[1] > step:
            early, last = slice(step - 1, step), -1
            own = distil(queries[:, early], candidates[:, early], queries[:, last], candidates[:, last])[0]
            terms["self_distillation"] = part.share * own
        return terms

    def _reduce(self, step_losses: Float[Tensor, "steps"]) -> Float[Tensor, ""]:
        """Make one number of the steps that are trained."""
        if not self.stepwise:
            return step_losses[-1]
        return step_losses.sum() if self.reduction == "sum" else step_losses.mean()


def _required(teacher: Teacher | None) -> Teacher:
    if teacher is None:
        raise ConfigurationError("distillation and false_negative_margin need a teacher: pass teacher=Teacher(queries, candidates).")
    return teacher


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
