"""Everything that decides a training run, as one frozen value; a recipe is a function that returns one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from genembed.errors import ConfigurationError
from genembed.settings import ModelSettings, preset_settings
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank adapter, saved in the layout that GIRCSE publishes."""

    rank: int = 64
    """Width of the two factors of a layer's change."""
    alpha: int = 32
    """The change is their product times alpha / rank."""
    dropout: float = 0.0
    """Share of a layer's inputs that its change does not see while training."""
    targets: tuple[str, ...] | str = "all-linear"
    """Names of the linear layers, a regular expression of their full names, or all of them."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.rank < 1 or self.alpha < 1:
            raise ConfigurationError(f"rank={self.rank}, alpha={self.alpha}: both must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"dropout={self.dropout}: must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured on held-out pairs while training goes on."""

    every: int = 200
    """Updates between two evaluations."""
    share: float = 0.01
    """Share of each file's pairs that is never trained on."""
    limit: int = 500
    """Held-out pairs used of each file."""
    steps: tuple[int, ...] = (1, 3, 5, 10, 20)
    """K at which quality is measured."""
    patience: int = 0
    """Stop after this many evaluations without a better mean over files, of nDCG@10 or Spearman's correlation, at the
    largest K; 0 to run to the end."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.every < 1 or self.limit < 1 or self.patience < 0 or not 0 < self.share < 1:
            raise ConfigurationError(f"{self}: every and limit must be at least 1, share between 0 and 1, patience not negative.")
        if not self.steps or min(self.steps) < 0:
            raise ConfigurationError(f"steps={self.steps}: name at least one K, none below 0.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    model: str
    """Model folder, hub id or built-in name to start from."""
    settings: ModelSettings | str | None = None
    """How the model makes an embedding: settings, a preset's name, or None for the folder's own."""
    files: tuple[DataFile, ...]
    """Training pairs."""
    objective: Objective = field(default_factory=Objective)
    """The loss."""
    teacher: str | None = None
    """Model whose in-batch similarities are distilled; None for z_0 of the model itself, where that is frozen."""
    teacher_settings: ModelSettings | str | None = None
    """How the teacher makes an embedding: settings, a preset's name, or None for its folder's own."""

    # The batch
    queries: int = 16
    """Pairs in a batch of one process."""
    negatives: int = 1
    """Hard negatives used of each pair, at most."""
    one_source: bool = True
    """Each batch from one file, so that in-batch negatives are of one kind."""
    query_tokens: int = 256
    """Longest query; texts are cut from the right, after the template."""
    passage_tokens: int = 2048
    """Longest positive and negative."""
    length_limits: tuple[int, ...] = ()
    """If any, each batch draws one of these as a further limit on its texts, so that short and long prompts both occur."""
    batch_tokens: int = 0
    """Limit on the longest text of a batch times its pairs: long texts come in smaller batches; 0 for none."""
    passage_rule: Literal["symmetric", "released"] = "symmetric"
    """Which passages take the query's instruction: those of symmetric files; or, as the released code decides, those whose
    instruction does not contain `retrieve`, or contains `semantic`."""
    instruction_share: float = 1.0
    """Share of batches that carry instructions; in the others all texts are read bare."""

    # The refinement
    min_steps: int = 5
    """Smallest K; every batch draws its own. 0 for one-pass models alone."""
    max_steps: int = 5
    """Largest K; 0 for one-pass models."""
    draw_steps: Literal["uniform", "log_uniform"] = "uniform"
    """How K is drawn: every K alike, or in proportion to 1 / K, so that large K are trained and most updates stay cheap."""

    # The weights
    lora: Lora | None = field(default_factory=Lora)
    """None to train all weights."""
    fit_head: int = 0
    """Texts from which the soft-token head of an encoder is started (ridge regression onto each text's mean input embedding)."""
    head_tokens: int = 0
    """Tokens that such a head can speak: the most frequent ones of those texts, special tokens left out; 0 for all. The products
    with the vocabulary are most of a small model's step."""
    learning_rate: float = 1e-5
    """Highest rate, reached after the warm-up; it falls to 0 along a cosine."""
    head_learning_rate: float = 2e-5
    """Of a trained soft-token head: at the adapter's rate it forgets its start, and every text speaks the same token (docs/LOG.md)."""
    weight_decay: float = 0.0
    """AdamW's."""
    warmup_ratio: float = 0.1
    """Share of the updates in which the rate rises."""
    max_gradient_norm: float = 1.0
    """Longer gradients are scaled down to this Euclidean norm."""
    updates: int
    """Optimizer steps."""
    accumulation: int = 1
    """Batches for each optimizer step."""
    seed: int = 0
    """Of the new weights, the order of the pairs and all that is drawn for a batch."""

    # Memory and machine
    chunk: int = 0
    """Texts that are refined at once under GradCache; 0 refines the whole batch at once."""
    checkpoint_layers: bool = False
    """Keep only the inputs of each layer and compute it again in the backward pass."""
    gather: bool = True
    """Let the candidates of all processes be negatives for each other."""
    fsdp: bool = False
    """Cut all weights, their gradients and Adam's state into parts over the processes, where a device has no room for them; for training
    all weights (lora=None) with several processes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass (automatic mixed precision); weights and loss stay in float32."""

    # What is kept
    evaluation: Evaluation | None = None
    """None to hold nothing out; `every` must be a multiple of `log_every`."""
    save_every: int = 200
    """Updates between two checkpoints."""
    keep: int = 2
    """Checkpoints kept for resuming; older ones are removed."""
    log_every: int = 10
    """Updates between two log lines; each has the mean loss since the one before."""
    report_to: tuple[str, ...] = ()
    """Trackers that Transformers knows: tensorboard, wandb, mlflow, trackio, ..."""
    served: ModelSettings | None = None
    """Settings written beside the weights, where they differ from those of the training."""

    def __post_init__(self) -> None:
        """Check the values that no other part checks."""
        if not self.files:
            raise ConfigurationError("files: name at least one file of pairs.")
        self._check_names()
        self._check_counts()
        self._check_rates()
        self._check_steps()
        self._check_effects()
        self._check_intervals()
        if self.settings is not None:
            self.check_settings(preset_settings(self.settings))

    def check_settings(self, settings: ModelSettings) -> None:
        """Refuse what a model with these settings cannot do.

        Raises:
            ConfigurationError: If quality is to be measured where the model has no embedding.
        """
        if self.evaluation is not None and 0 in self.evaluation.steps and settings.pooling.needs_steps:
            raise ConfigurationError(
                f"evaluation: steps={self.evaluation.steps}: the model pools generated states alone, so it has no vector at K=0 to be "
                "measured; leave 0 out."
            )

    def _check_names(self) -> None:
        if self.passage_rule not in ("symmetric", "released"):
            raise ConfigurationError(f"passage_rule={self.passage_rule!r}: choose symmetric or released.")
        if self.draw_steps not in ("uniform", "log_uniform"):
            raise ConfigurationError(f"draw_steps={self.draw_steps!r}: choose uniform or log_uniform.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"dtype={self.dtype!r}: choose float32 or bfloat16.")

    def _check_counts(self) -> None:
        for name in ("queries", "query_tokens", "passage_tokens", "updates", "accumulation", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in ("negatives", "batch_tokens", "chunk", "fit_head", "head_tokens", "min_steps"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name}={getattr(self, name)}: must not be negative.")
        if any(limit < 1 for limit in self.length_limits):
            raise ConfigurationError(
                f"length_limits={self.length_limits}: a text has at least one token; name limits of at least 1, or none: ()."
            )

    def _check_rates(self) -> None:
        for name in ("learning_rate", "head_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name}={getattr(self, name)}: must not be negative, and finite; 0 switches it off.")
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigurationError(
                f"warmup_ratio={self.warmup_ratio}: a share of the updates in [0, 1) is needed, for example 0.1; 0 for no warm-up."
            )
        if not self.max_gradient_norm > 0:
            raise ConfigurationError(
                f"max_gradient_norm={self.max_gradient_norm}: gradients of norm 0 train nothing; it must be above 0, and so that "
                "nothing is clipped large, for example 1e9."
            )
        if not 0 <= self.instruction_share <= 1:
            raise ConfigurationError(f"instruction_share={self.instruction_share}: must be in [0, 1].")

    def _check_steps(self) -> None:
        if self.max_steps < self.min_steps:
            raise ConfigurationError(f"min_steps={self.min_steps}, max_steps={self.max_steps}: the range of K is empty.")
        if self.min_steps == 0 < self.max_steps:
            raise ConfigurationError(
                f"min_steps=0, max_steps={self.max_steps}: a batch of K=0 has no refinement to learn from; use min_steps=1, or "
                "max_steps=0 for a one-pass model."
            )
        if self.draw_steps != "uniform" and self.min_steps == self.max_steps:
            raise ConfigurationError(f"draw_steps={self.draw_steps!r} has no effect: K is always {self.max_steps}.")
        if self.evaluation is not None and self.max_steps == 0 < max(self.evaluation.steps):
            raise ConfigurationError(
                f"evaluation: steps={self.evaluation.steps} with max_steps=0: a one-pass model makes no steps; use steps=(0,)."
            )

    def _check_effects(self) -> None:
        """Refuse options that would have no effect."""
        objective = self.objective
        if self.head_tokens and not (self.fit_head and self.lora):
            raise ConfigurationError(f"head_tokens={self.head_tokens} has an effect with fit_head and an adapter only.")
        if self.fsdp and self.lora is not None:
            raise ConfigurationError(
                f"fsdp=True with lora={self.lora}: an adapter is small, and each process has it whole; leave fsdp out (DDP), or train all "
                "weights with lora=None (--set lora=null)."
            )
        if self.teacher is not None and not objective.needs_teacher:
            raise ConfigurationError(
                f"teacher={self.teacher!r}: the objective asks no teacher; set objective.distillation or "
                "objective.false_negative_margin, or use teacher=None."
            )
        if self.teacher_settings is not None and self.teacher is None:
            raise ConfigurationError("teacher_settings have no effect without a teacher: name one, or leave them out.")
        if objective.self_distillation > 0 and self.max_steps <= objective.self_distillation_step:
            raise ConfigurationError(
                f"max_steps={self.max_steps}: no step comes after objective.self_distillation_step={objective.self_distillation_step} "
                "for it to learn from; use a larger max_steps, an earlier step, or objective.self_distillation=0."
            )

    def _check_intervals(self) -> None:
        if self.evaluation is not None and self.evaluation.every % self.log_every:
            raise ConfigurationError(
                f"evaluation.every={self.evaluation.every} with log_every={self.log_every}: quality would stand in lines of the history "
                "without a loss; make evaluation.every a multiple of log_every, or log_every smaller."
            )
