"""Transformers' Trainer with our loss, our checkpoints and our evaluation; its loop is untouched."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from genembed.backbone import Backbone
from genembed.errors import ConfigurationError, NonFiniteError
from genembed.files import publish
from genembed.tokens import TokenIds
from genembed.train.collate import BatchLoader, TrainingBatch
from genembed.train.durable import writing
from genembed.train.gather import from_first_process, gather_across_processes, mean_across_processes
from genembed.train.gradcache import cached_loss
from genembed.train.heldout import HeldOut
from genembed.train.losses import known_answers
from genembed.train.means import LossMeans
from genembed.train.model import TrainableEmbedder
from genembed.train.objective import WHOLE, ObjectiveValue, Part, Teacher
from genembed.train.recipe import Recipe
from genembed.train.sharding import is_sharded, parts_of_state, whole
from genembed.train.teacher import FrozenTeacher
from genembed.train.trajectories import Trajectories, trajectories

STAGING = ".incomplete"
BAD_BATCH = "bad_batch.json"

_NO_KEY = -1
"""Key of no text; hashes are not negative."""


class StepwiseTrainer(Trainer):
    """Trains a `TrainableEmbedder` with the stepwise objective.

    Args:
        model: What is trained.
        recipe: The run.
        loader: Gives the batches of one of several processes, from its number and theirs.
        held_out: What is evaluated while training, or None.
        output: Folder of the run.
        teacher: Embeds the texts for distillation; None for z_0 of the model.
    """

    def __init__(
        self,
        model: TrainableEmbedder,
        recipe: Recipe,
        loader: Callable[[int, int], BatchLoader],
        held_out: HeldOut | None,
        output: Path,
        teacher: FrozenTeacher | None = None,
    ) -> None:
        self.embedder, self.recipe, self.loader, self.held_out = model, recipe, loader, held_out
        self.run_folder, self.teacher = output, teacher
        # A mask of false negatives means nothing for scored pairs.
        self.scored_objective = replace(recipe.objective, false_negative_margin=None)
        self._means = LossMeans()
        self._since_update: list[TrainingBatch] = []
        arguments = _arguments(recipe, output, evaluate=held_out is not None)
        super().__init__(model=model, args=arguments, train_dataset=[0], eval_dataset=[0])
        if self.args.n_gpu > 1:
            raise ConfigurationError(
                f"{self.args.n_gpu} GPUs and one process: start one process for each GPU, "
                f"torchrun --nproc_per_node {self.args.n_gpu} -m genembed.cli train ..., or hide the others with CUDA_VISIBLE_DEVICES."
            )
        # Accelerate must not wrap weights that are cut into parts already.
        self.is_distributed_loading_by_transformers = is_sharded(model)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch, to be divided by the accumulated batches
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)

    def get_train_dataloader(self) -> Any:
        """Return our batches as they are: they are split over processes already."""
        return self.loader(self.args.process_index, self.args.world_size)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        """Return the objective of one batch; stop the run at a loss that is not finite."""
        batch: TrainingBatch = inputs["batch"]
        self._since_update.append(batch)
        if self.recipe.chunk:
            loss = self._cached(model, batch)
        else:
            refined = model(batch.prompts, batch.steps)
            loss = self._objective(refined.vectors, refined.start, batch).total
        self._check_finite("loss", loss.detach())
        return loss

    def _cached(self, model: Any, batch: TrainingBatch) -> Tensor:
        prompts = batch.prompts
        starts: dict[int, Tensor] = {}

        def embed(span: slice) -> Tensor:
            refined = model(prompts[span], batch.steps)
            starts.setdefault(span.start, refined.start.detach())
            return cast("Tensor", refined.vectors)

        def loss(vectors: Tensor) -> Tensor:
            start = torch.cat([starts[place] for place in sorted(starts)])
            return self._objective(vectors, start, batch).total

        no_sync = getattr(model, "no_sync", contextlib.nullcontext)
        return cached_loss(embed, len(prompts), self.recipe.chunk, loss, no_sync=no_sync, chunks=self._least_chunks(len(prompts)))

    def _least_chunks(self, texts: int) -> int:
        """Return how many chunks this process must make at least, however few texts it has.

        Weights in parts are gathered by all processes together. DistributedDataParallel exchanges more than gradients in a pass with
        gradient, which comes before the loss where there is one chunk, and after it where there are several: all must do alike.
        """
        if self.args.world_size == 1:
            return 1
        most = int(gather_across_processes(torch.tensor([texts], device=self.args.device)).max())
        chunks = math.ceil(most / self.recipe.chunk)
        return chunks if is_sharded(self.embedder) else min(2, chunks)

    def _objective(self, vectors: Tensor, start: Tensor, batch: TrainingBatch) -> ObjectiveValue:
        count = len(batch.queries)
        queries, candidates = vectors[:count], vectors[count:]
        scores = [pair.score for pair in batch.pairs if pair.score is not None]
        objective = self.scored_objective if scores else self.recipe.objective
        teacher = self._taught(start, batch) if objective.needs_teacher else None
        if scores:
            known = torch.tensor(scores, dtype=vectors.dtype, device=vectors.device)
            value = self._rank(queries, candidates, known, teacher)
        else:
            value = self._contrast(queries, candidates, batch, teacher)
        self._means.add(value)
        return value

    @property
    def _joins(self) -> bool:
        """Whether the batches of several processes are one."""
        return self.recipe.gather and self.args.world_size > 1

    def _rank(self, queries: Tensor, candidates: Tensor, scores: Tensor, teacher: Teacher | None) -> ObjectiveValue:
        """Rank the pairs of this process, or those of all processes, which every one of them then does."""
        if self._joins:
            queries, candidates, scores = map(gather_across_processes, (queries, candidates, scores))
            if teacher is not None:
                teacher = Teacher(gather_across_processes(teacher.queries), gather_across_processes(teacher.candidates))
        return self.scored_objective(queries, candidates, scores=scores, teacher=teacher)

    def _contrast(self, queries: Tensor, candidates: Tensor, batch: TrainingBatch, teacher: Teacher | None) -> ObjectiveValue:
        """Contrast the queries of this process with its own candidates, or with those of all processes."""
        count, keys = len(queries), batch.keys.to(queries.device)
        answered = torch.nn.functional.pad(keys[:count], (0, 0, 0, len(candidates) - count), value=_NO_KEY)
        own = _Candidates(candidates, keys[count:], answered, None if teacher is None else teacher.candidates)
        positives, share = torch.arange(count, device=queries.device), 1.0
        if self._joins:
            counts = gather_across_processes(torch.tensor([[count, len(candidates)]], device=queries.device))
            # This process's positives move behind the candidates of the processes before it.
            own, positives = own.gathered(), positives + counts[: self.args.process_index, 1].sum()
            share = count * len(counts) / int(counts[:, 0].sum())
        if teacher is not None and own.taught is not None:
            teacher = Teacher(teacher.queries, own.taught)
        ignore = known_answers(keys[:count], own.keys, own.answered, positives)
        part = Part(share, mean_across_processes) if self._joins else WHOLE
        return self.recipe.objective(queries, own.vectors, positives=positives, ignore=ignore, teacher=teacher, part=part)

    def _taught(self, start: Tensor, batch: TrainingBatch) -> Teacher:
        """Return the teacher's embeddings of a batch."""
        count = len(batch.queries)
        known = start.detach() if self.teacher is None else self.teacher(batch.texts)
        return Teacher(known[:count], known[count:])

    def _check_finite(self, what: str, value: Tensor) -> None:
        """Stop before weights are changed by a number that is not finite; keep the batches since the last update."""
        if bool(torch.isfinite(value)):
            return
        path = self.run_folder / BAD_BATCH
        kept = [{"batch": one.number, "steps": one.steps, "pairs": [asdict(pair) for pair in one.pairs]} for one in self._since_update]
        path.write_text(json.dumps({what: str(value.item()), "batches": kept}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        raise NonFiniteError(
            f"the {what} of batch {self._since_update[-1].number} is {value.item()}; its texts are in {path}. A smaller learning rate or a "
            "higher temperature usually cures it; the last complete checkpoint is untouched."
        )

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip gradients; refuse those that are not finite."""
        norm = torch.as_tensor(super()._clip_grad_norm(model))  # type: ignore[no-untyped-call]
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._check_finite("gradient norm", norm)
        self._since_update = []
        return norm

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Add accumulated batches up in parts; to send them once, each process would have to hold all gradients."""
        yield

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return AdamW, with a learning rate of its own for a trained soft-token head."""
        head = set() if self.embedder.trained_head is None else set(self.embedder.trained_head.parameters())
        trained = [weight for weight in self.embedder.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in trained if weight not in head], "lr": self.recipe.learning_rate},
            {"params": [weight for weight in trained if weight in head], "lr": self.recipe.head_learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.recipe.weight_decay)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss and its parts as means over batches and processes since the line before."""
        if "loss" in logs:
            logs = {**logs, **self._means.take(self._mean_over_processes)}
        super().log(logs, start_time)

    def _mean_over_processes(self, numbers: Tensor) -> Tensor:
        return cast("Tensor", self.accelerator.reduce(numbers, reduction="mean"))

    def evaluate(self, *_arguments: Any, metric_key_prefix: str = "eval", **_options: Any) -> dict[str, float]:
        """Measure quality on held-out pairs at every K of the recipe, on the first process; all of them read where each has a part."""
        held_out = self.held_out
        if held_out is None:
            return {}
        self.embedder.eval()
        if is_sharded(self.embedder):
            found = held_out.measure(self.embedder)
            values = from_first_process(lambda: found)
        else:
            values = from_first_process(lambda: held_out.measure(partial(_refined, self.embedder.backbone)))
        self.embedder.train()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the model's own folder format; no pickled arguments."""
        self.embedder.save(Path(output_dir or self.run_folder), self.recipe.served or self.embedder.settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.embedder.restore(Path(resume_from_checkpoint))
        self._means.load(Path(resume_from_checkpoint), self.args.device)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimizer's state whole, so that a checkpoint is the same whatever the number of processes and their parts."""
        if not is_sharded(self.embedder):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.embedder):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        # Mapped, not read: each process takes its parts out of it.
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        self.optimizer.load_state_dict(parts_of_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _get_output_dir(self, trial: Any) -> str:
        # Checkpoints are written here and renamed once complete.
        return str(self.run_folder / STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that is complete or absent."""
        name = f"checkpoint-{self.state.global_step}"
        staged, final = self.run_folder / STAGING / name, self.run_folder / name
        with writing(final, leftover=self.run_folder / STAGING):
            super()._save_checkpoint(model, trial)
            self._means.save(staged, self._mean_over_processes, write=self.args.should_save)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with writing(final, leftover=self.run_folder / STAGING):
                publish(staged, final)
            rotate_checkpoints(output_dir=str(self.run_folder), save_total_limit=self.recipe.keep, use_mtime=True)


def _refined(backbone: Backbone, prompts: Sequence[TokenIds], steps: int) -> Trajectories:
    return trajectories(backbone, prompts, steps=steps)


def complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    numbered = [(int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return max(numbered)[1] if numbered else None


class _Candidates(NamedTuple):
    """What queries are contrasted with."""

    vectors: Tensor
    keys: Tensor
    answered: Tensor
    """Keys of the query that a candidate is the positive of."""
    taught: Tensor | None
    """The teacher's embeddings."""

    def gathered(self) -> _Candidates:
        """Return the candidates of all processes."""
        vectors, keys, answered = map(gather_across_processes, (self.vectors, self.keys, self.answered))
        return _Candidates(vectors, keys, answered, None if self.taught is None else gather_across_processes(self.taught))


def _arguments(recipe: Recipe, output: Path, *, evaluate: bool) -> TrainingArguments:
    evaluation = recipe.evaluation
    if recipe.dtype == "bfloat16" and not (torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")):
        raise ConfigurationError("dtype='bfloat16': this machine has no fast bfloat16; use float32.")
    return TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.updates,
        per_device_train_batch_size=recipe.queries,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=round(recipe.warmup_ratio * recipe.updates),
        lr_scheduler_type="cosine",
        max_grad_norm=recipe.max_gradient_norm,
        bf16=recipe.dtype == "bfloat16",
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=evaluation.every if evaluation is not None else None,
        save_strategy="steps",
        save_steps=recipe.save_every,
        ignore_data_skip=True,  # our loader starts where the run stopped
        report_to=list(recipe.report_to),
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
