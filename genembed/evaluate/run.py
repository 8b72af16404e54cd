"""A model through tasks, one by one; a task that is finished is not run again."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]
import mteb
import numpy as np
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.results import TaskResult

from genembed.errors import ConfigurationError, DataError
from genembed.evaluate.encoder import Encoder
from genembed.evaluate.items import items_of, write_items
from genembed.evaluate.peers import BM25
from genembed.evaluate.two_stage import ExpandedEncoder, ExpandedSearch

WORK_FILE = "work.jsonl"
"""Beside mteb's results: texts, steps, tokens and seconds of each task that was run, and what expanding the texts took."""

_THIRD_PARTIES = r"(mteb|sklearn|datasets|multiprocess|torch|bm25s)(\.|$)"


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one task gave."""

    task: str
    kind: str
    """mteb's type of task."""
    metric: str
    score: float
    """The main score, in [-1, 1]; over several subsets their mean."""
    mean_steps: float | None
    """Refinement steps of a text; None for models that do not refine."""
    texts: int | None
    """Texts embedded."""
    seconds: float | None
    """Wall time of the run that gave the score."""
    stored: bool
    """Whether it was found in the folder of results, and not run now."""


def evaluate(model: Any, tasks: Iterable[AbsTask], folder: Path, *, show: Callable[[str], None] = lambda _: None) -> list[Score]:
    """Run tasks, and keep the results in mteb's layout.

    They lie in `folder/results/MODEL/REVISION/experiments/SETTINGS/TASK.json`, and `mteb.ResultCache(folder)` reads them. A
    result of the same model, settings and data is taken as it is; when the data has changed the task is run again.

    Args:
        model: An `Encoder`, or any model that mteb can evaluate, or one of them `expanded`.
        tasks: mteb's tasks, or those of `local_task`.
        folder: Where results are kept.
        show: Called with the name of each task before it is run.

    Returns:
        A score for each task, in order.

    Raises:
        ConfigurationError: If a task has no instruction, or the model cannot do it.
        DataError: If the data of a task cannot be read, as without a network.
        TextError: If a text cannot be embedded.
    """
    tasks = list(tasks)
    for task in tasks:  # all of them, before hours of the first
        _check(model, task)
    cache = mteb.ResultCache(folder)
    return [_scored(model, task, cache, show) for task in tasks]


def place(model: Any, folder: Path) -> Path:
    """Return the folder in which the results of a model lie."""
    return Path(mteb.ResultCache(folder).get_task_result_path("any", model.mteb_model_meta)).parent


def means(scores: Iterable[Score]) -> dict[str, float]:
    """Return the mean score of each type of task, then that of all tasks under `all`."""
    scores = list(scores)
    kinds = dict.fromkeys(score.kind for score in scores)
    found = {kind: float(np.mean([score.score for score in scores if score.kind == kind])) for kind in kinds}
    return {**found, "all": float(np.mean([score.score for score in scores]))} if scores else {}


def _check(model: Any, task: AbsTask) -> None:
    if isinstance(model, (ExpandedEncoder, ExpandedSearch)):
        _check(model.model, task)
    for part in _parts(task):
        if isinstance(model, (ExpandedEncoder, ExpandedSearch)):
            model.expansions.instruction(part.metadata.name, None)
        if isinstance(model, Encoder):
            model.instructions.of(part.metadata.name)
        if isinstance(model, BM25) and not isinstance(part, AbsTaskRetrieval):
            raise ConfigurationError(
                f"{part.metadata.name}: BM25 has no vectors, so it cannot do a task of {part.metadata.type}; leave it out."
            )


def _scored(model: Any, task: AbsTask, cache: mteb.ResultCache, show: Callable[[str], None]) -> Score:
    folder = place(model, cache.cache_path)
    found = cache.load_task_result(task.metadata.name, model.mteb_model_meta)
    changed = found is not None and _is_of_other_data(found, task)
    if found is not None and not changed and not found.get_missing_evaluations(task):
        return _score(task, found, _read_work(folder).get(task.metadata.name, {}), stored=True)
    show(task.metadata.name)
    with _quiet():
        with _data_of(task), tempfile.TemporaryDirectory() as predictions:
            result, seconds, work = _run(model, task, cache, Path(predictions), changed=changed)
            items = items_of(task, Path(predictions))
        if items is not None:
            write_items(folder, items)
    counts = {"task": task.metadata.name, "seconds": seconds, **work}
    with (folder / WORK_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(counts) + "\n")
    return _score(task, result, counts, stored=False)


def _is_of_other_data(found: TaskResult, task: AbsTask) -> bool:
    """Whether a result is of data that has changed since; mteb itself does not look at the data."""
    return not isinstance(task, AbsTaskAggregate) and found.dataset_revision != task.metadata.revision


def _run(
    model: Any, task: AbsTask, cache: mteb.ResultCache, predictions: Path, *, changed: bool
) -> tuple[TaskResult, float, dict[str, int | float]]:
    _take_work(model)
    start = time.perf_counter()
    done = mteb.evaluate(
        model,
        task,
        cache=cache,
        overwrite_strategy="always" if changed else "only-missing",
        prediction_folder=None if isinstance(task, AbsTaskAggregate) else predictions,
        co2_tracker=False,
        show_progress_bar=False,
        # Our engine makes batches of its own, and a long list gives it more to choose from.
        encode_kwargs={"batch_size": 512 if isinstance(_reader(model), Encoder) else 32, "show_progress_bar": False},
    )
    seconds, work = time.perf_counter() - start, _take_work(model)
    # As it was written, so that a score reads the same when it is found later.
    kept = cache.load_task_result(task.metadata.name, model.mteb_model_meta)
    return done.task_results[0] if kept is None else kept, seconds, work


def _reader(model: Any) -> Any:
    """Return what reads the texts, expanded or not."""
    return model.model if isinstance(model, (ExpandedEncoder, ExpandedSearch)) else model


def _take_work(model: Any) -> dict[str, int | float]:
    """Return the counts of a model that counts, since they were last taken."""
    if isinstance(model, (ExpandedEncoder, ExpandedSearch)):
        return {**_take_work(model.model), **asdict(model.expansions.expander.take_work())}
    return asdict(model.take_work()) if isinstance(model, Encoder) else {}


def _score(task: AbsTask, result: TaskResult, work: dict[str, Any], *, stored: bool) -> Score:
    steps, texts = work.get("steps"), work.get("texts")
    return Score(
        task=task.metadata.name,
        kind=task.metadata.type,
        metric=task.metadata.main_score,
        score=float(result.get_score(splits=list(task.eval_splits))),
        mean_steps=steps / texts if texts and steps is not None else None,
        texts=texts,
        seconds=work.get("seconds"),
        stored=stored,
    )


def _read_work(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the last run of each task took; a line that was cut by a kill is passed over."""
    found: dict[str, dict[str, Any]] = {}
    file = folder / WORK_FILE
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["task"]] = row
    return found


@contextmanager
def _data_of(task: AbsTask) -> Iterator[None]:
    """Hold the data of a task while it is evaluated, so that its judgements are still there for the scores of single items."""
    loaded = [part for part in _parts(task) if not part.data_loaded]
    try:
        for part in loaded:
            part.load_data()
    except OSError as error:  # what the hub's libraries raise without a network
        raise DataError(
            f"{task.metadata.name}: its data cannot be taken from the hub or the local cache ({error}); check the network, or evaluate a "
            "set on disk with --local."
        ) from error
    try:
        yield
    finally:
        for part in loaded:
            part.unload_data()


def _parts(task: AbsTask) -> list[AbsTask]:
    """Return the tasks an aggregate stands for, or the task itself."""
    return list(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what third parties say while they score: bars of steps that take no time, and warnings of their own code."""
    shown, hub = datasets.is_progress_bar_enabled(), logging.getLogger("huggingface_hub")
    level = hub.level
    datasets.disable_progress_bars()
    hub.setLevel(logging.ERROR)  # it tells of every retry
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_THIRD_PARTIES)
            yield
    finally:
        hub.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
