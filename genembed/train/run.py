"""One training run from a recipe to a model folder."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from genembed.errors import ConfigurationError
from genembed.files import recover_all
from genembed.settings import ModelSettings
from genembed.tokens import PromptTokenizer, TokenIds
from genembed.train.batches import BatchStream, held_out_pairs
from genembed.train.callbacks import BEST, History, KeepBest, OwnIntervals, ProgressBar
from genembed.train.collate import BatchLoader, PairCollator
from genembed.train.durable import replace_text, writing
from genembed.train.gather import is_first_process
from genembed.train.head import fit_head
from genembed.train.heldout import HeldOut
from genembed.train.launch import check_launch, continued
from genembed.train.model import TrainableEmbedder, build
from genembed.train.overlap import TextFilter
from genembed.train.pairs import BadRows
from genembed.train.recipe import Recipe
from genembed.train.sharding import shard
from genembed.train.teacher import FrozenTeacher, check_own_start
from genembed.train.trainer import STAGING, StepwiseTrainer, complete_checkpoint

RECIPE_FILE = "recipe.json"

_FREE = ("updates", "save_every", "keep", "log_every", "report_to", "fsdp")
"""What may change between a run and its continuation; the number of processes may too (`launch.continued`)."""

log = logging.getLogger(__name__)


def train(
    recipe: Recipe, output: Path, *, resume: bool = False, strict: bool = False, exclude: TextFilter | None = None
) -> TrainableEmbedder:
    """Train a model and write it to a folder that `genembed.load` reads.

    The folder also gets the recipe, the curves (`history.csv`, `curves.png`) and, while the run lasts, its newest checkpoints.

    Args:
        recipe: The run.
        output: Folder of the run and of the model; created.
        resume: Go on from the newest complete checkpoint of the folder, also with another number of processes; the losses are those of an
            unbroken run on CPU.
        strict: Stop at the first bad row instead of counting it.
        exclude: Texts that must not be trained on.

    Returns:
        The trained model: the best one on held-out pairs where the recipe's evaluation has a patience, else the last one.

    Raises:
        ConfigurationError: If the recipe cannot work, or the folder holds another run.
        TrainingError: If a checkpoint cannot be written.
        NonFiniteError: If the loss stops being finite; the batch is kept for inspection.
    """
    recipe, checkpoint = _prepare(recipe, output, exclude, resume=resume)
    set_seed(recipe.seed)
    model = build(recipe, lambda tokenizer: _texts(recipe, tokenizer, exclude))
    if recipe.objective.needs_teacher and recipe.teacher is None:
        check_own_start(model.settings)
    data = _Data(recipe, PairCollator(recipe, model.tokenizer, model.settings), exclude, strict=strict)
    if recipe.fit_head and checkpoint is None:
        fit_head(model, _texts(recipe, model.tokenizer, exclude))
    if recipe.fsdp:
        shard(model, PartialState().device.type, bfloat16=recipe.dtype == "bfloat16")
    bar = ProgressBar()
    trainer = _trainer(model, data, output, checkpoint, bar)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        bar.close()
        data.close()
        data.report()
    if recipe.evaluation is not None and recipe.evaluation.patience:
        model.restore(output / BEST)
    with writing(output):
        model.save(output, recipe.served or model.settings)
    return model.eval()


def _prepare(recipe: Recipe, output: Path, exclude: TextFilter | None, *, resume: bool) -> tuple[Recipe, Path | None]:
    """Check how and where the run was started; return its recipe for these processes, and the checkpoint to go on from."""
    state, path = PartialState(cpu=not torch.cuda.is_available()), output / RECIPE_FILE
    check_launch(recipe, state.num_processes)
    if state.is_main_process:
        shutil.rmtree(output / STAGING, ignore_errors=True)  # what a killed run left half written
        recover_all(output)
    state.wait_for_everyone()
    checkpoint = complete_checkpoint(output) if output.is_dir() else None
    if checkpoint is not None and not resume:
        raise ConfigurationError(f"{output} holds a run ({checkpoint.name}); go on with --resume, or choose another folder.")
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if checkpoint is not None and path.is_file() else {}
    if before:
        recipe = continued(recipe, before, state.num_processes)
    value = {**recipe_json(recipe), "processes": state.num_processes, "excluded": 0 if exclude is None else exclude.fingerprint}
    if before:
        # As it was started: the same recipe goes on with any number of processes after any other.
        value |= {name: before[name] for name in ("queries", "processes")}
    changed = sorted(name for name in before if name not in _FREE and before[name] != value.get(name))
    if changed:
        raise ConfigurationError(f"{output}: the run was started with another {', '.join(changed)}; choose another folder.")
    if state.is_main_process:
        if resume and checkpoint is None:
            log.warning("%s has no complete checkpoint: the run starts from the beginning.", output)
        output.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(value, indent=2) + "\n")
    state.wait_for_everyone()
    return recipe, checkpoint


@dataclass(frozen=True, eq=False)
class _Data:
    """The pairs of a run on their way into batches, and what is left out on it."""

    recipe: Recipe
    collator: PairCollator
    exclude: TextFilter | None
    _: KW_ONLY
    strict: bool
    bad: BadRows = field(default_factory=BadRows)
    crowded_out: Counter[str] = field(default_factory=Counter)
    loaders: list[BatchLoader] = field(default_factory=list)
    """Those that were asked for."""

    def loader(self, done: int, process: int, processes: int) -> BatchLoader:
        """Return the batches of one process after the updates that are done."""
        recipe = self.recipe
        size = recipe.queries * processes
        stream = _stream(recipe, self.exclude, size, strict=self.strict, bad=self.bad, crowded_out=self.crowded_out)
        first, count = done * recipe.accumulation, recipe.updates * recipe.accumulation
        loader = BatchLoader(stream, self.collator, first=first, count=count, process=process, processes=processes)
        self.loaders.append(loader)
        return loader

    def close(self) -> None:
        """Close the files."""
        for loader in self.loaders:
            loader.close()

    def report(self) -> None:
        """Say what was not used; all processes read the same pairs, and the first one says it."""
        if not is_first_process():
            return
        if self.bad.total or self.bad.texts:
            log.warning("%s", self.bad.report())
        dropped = Counter() if self.exclude is None else self.exclude.dropped
        for reason, counts in (
            ("pairs whose instruction left no room for a text", self.collator.skipped),
            (f"pairs for which batch_tokens={self.recipe.batch_tokens} left no room in their batch", self.collator.cut),
            ("pairs left out of a pass over their file, as they share texts with too many others", self.crowded_out),
            ("kept out of training as texts of a test set", dropped),
        ):
            if counts.total():
                log.warning("%s: %s", reason, dict(counts))


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as the object that is written beside the model."""
    own = {name: getattr(recipe, name) for name in ("settings", "served", "teacher_settings")}
    plain = {name: value.to_json() if isinstance(value, ModelSettings) else value for name, value in own.items()}
    result: dict[str, Any] = json.loads(json.dumps({**asdict(replace(recipe, settings=None, served=None, teacher_settings=None)), **plain}))
    return result


def _trainer(model: TrainableEmbedder, data: _Data, output: Path, checkpoint: Path | None, bar: ProgressBar) -> StepwiseTrainer:
    recipe, held_out = data.recipe, None
    if recipe.evaluation is not None:
        every = replace(recipe, batch_tokens=0, length_limits=(), instruction_share=1.0)
        held_out = HeldOut(
            held_out_pairs(recipe.files, share=recipe.evaluation.share, limit=recipe.evaluation.limit, exclude=data.exclude),
            PairCollator(every, model.tokenizer, model.settings),
            recipe.evaluation,
        )
    done = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
    teacher = (
        FrozenTeacher(recipe.teacher, recipe.teacher_settings, device=str(model.backbone.device)) if recipe.teacher is not None else None
    )
    trainer = StepwiseTrainer(model, recipe, partial(data.loader, done), held_out, output, teacher)
    for callback in (bar, OwnIntervals()):
        trainer.add_callback(callback)
    trainer.add_callback(History(output))
    if held_out is not None:
        trainer.add_callback(KeepBest(model, recipe, output, held_out.headline))
    return trainer


def _stream(
    recipe: Recipe, exclude: TextFilter | None, batch_size: int, *, strict: bool, bad: BadRows, crowded_out: Counter[str]
) -> BatchStream:
    return BatchStream(
        recipe.files,
        batch_size=batch_size,
        one_source=recipe.one_source,
        negatives=recipe.negatives,
        seed=recipe.seed,
        held_out=recipe.evaluation.share if recipe.evaluation is not None else 0.0,
        exclude=exclude,
        strict=strict,
        bad=bad,
        crowded_out=crowded_out,
    )


def _texts(recipe: Recipe, tokenizer: PromptTokenizer, exclude: TextFilter | None) -> list[TokenIds]:
    """Return prompts of the first batches, bare, as many as the head is started from."""
    prompts: list[TokenIds] = []
    size = recipe.queries * PartialState().num_processes  # or as many processes would start another head
    for pairs in _stream(recipe, exclude, size, strict=False, bad=BadRows(), crowded_out=Counter()):
        prompts += tokenizer([text for pair in pairs for text in (pair.query, *pair.positives, *pair.negatives)]).ids
        if len(prompts) >= recipe.fit_head:
            break
    return prompts[: recipe.fit_head]
