"""The scores of single queries, pairs and texts, which mteb's results leave out: two runs are compared with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytrec_eval
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.aggregated_task import AbsTaskAggregate

from genembed.errors import DataError
from genembed.files import replacing

ITEMS_FOLDER = "items"
"""Beside mteb's results, one file for each task; mteb does not look into it."""

MEAN, SPEARMAN, AVERAGE_PRECISION = "mean", "spearman", "average precision"
"""How the score of a task comes from its items."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Items:
    """The items of one task."""

    task: str
    metric: str
    """mteb's name of the score."""
    statistic: str
    """How the score comes from the values: their mean, or their agreement with `gold`."""
    revision: str
    """Of the data."""
    ids: list[str]
    values: list[float]
    """Score of each item, or what the model predicts for it."""
    gold: list[float] | None
    """What people say of each item; None where the values are scores."""


def items_of(task: AbsTask, predictions: Path) -> Items | None:
    """Score the items of a task that has just been run.

    Args:
        task: With its data.
        predictions: Folder in which mteb left what the model predicted.

    Returns:
        The items; None for tasks whose score does not come from single items, as that of a clustering.
    """
    file = predictions / f"{task.metadata.name}_predictions.json"
    score = next((score for kind, score in _SCORED if isinstance(task, kind)), None)
    if score is None or isinstance(task, AbsTaskAggregate) or not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    ids: list[str] = []
    values: list[float] = []
    gold: list[float] = []
    scored: tuple[str, str] | None = None
    for subset, split in ((subset, split) for subset in task.hf_subsets for split in task.eval_splits):
        guesses = found.get(subset, {}).get(split)  # not there where an evaluation that was killed has been resumed
        rows = None if guesses is None else score(task, _split(task, subset, split), guesses)
        if rows is None:
            return None
        scored = rows.metric, rows.statistic
        ids += [f"{subset}/{split}/{name}" for name in rows.ids]
        values += rows.values
        gold += rows.gold or []
    if scored is None:
        return None
    return Items(
        task=task.metadata.name,
        metric=scored[0],
        statistic=scored[1],
        revision=str(task.metadata.revision),
        ids=ids,
        values=values,
        gold=gold or None,
    )


def write_items(folder: Path, items: Items) -> None:
    """Write the items of a task into a folder of results."""
    (folder / ITEMS_FOLDER).mkdir(parents=True, exist_ok=True)
    with replacing(folder / ITEMS_FOLDER / f"{items.task}.json") as file:
        file.write(json.dumps(asdict(items)).encode())


def read_items(folder: Path) -> dict[str, Items]:
    """Read the items of all tasks in a folder of results, by task.

    Raises:
        DataError: If there are none, or a file is damaged.
    """
    files = sorted((folder / ITEMS_FOLDER).glob("*.json"))
    if not files:
        raise DataError(
            f"{folder}: holds no scores of single items ({ITEMS_FOLDER}/); name the folder of one run of genembed evaluate, the one that "
            "holds its TASK.json."
        )
    try:
        found = [Items(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{folder / ITEMS_FOLDER}: cannot be read ({error}); delete it and evaluate again.") from error
    return {items.task: items for items in found}


@dataclass(frozen=True, eq=False)
class _Rows:
    metric: str
    statistic: str
    ids: Sequence[str]
    values: list[float]
    gold: list[float] | None = None


def _split(task: AbsTask, subset: str, split: str) -> Any:
    data: Any = task.dataset
    return data[subset][split] if subset in data else data[split]


def _retrieval(task: Any, data: Any, found: dict[str, dict[str, float]]) -> _Rows | None:
    if task.metadata.main_score != "ndcg_at_10" or task.skip_first_result:
        return None
    if task.ignore_identical_ids:
        found = {query: {name: score for name, score in own.items() if name != query} for query, own in found.items()}
    scores = pytrec_eval.RelevanceEvaluator(dict(data["relevant_docs"]), {"ndcg_cut.10"}).evaluate(found)
    ids = sorted(scores)
    return _Rows("ndcg_at_10", MEAN, ids, [float(scores[query]["ndcg_cut_10"]) for query in ids])


def _sts(_: Any, data: Any, found: dict[str, list[float]]) -> _Rows:
    gold = [float(score) for score in data["score"]]
    return _Rows("cosine_spearman", SPEARMAN, _numbers(gold), found["cosine_scores"], gold)


def _pairs(task: Any, data: Any, found: dict[str, list[float]]) -> _Rows | None:
    if len(data) == 1:  # mteb's older sets have all pairs in one row
        data = data[0]
    gold = [float(label) for label in data[task.label_column_name]]
    return _Rows("cosine_ap", AVERAGE_PRECISION, _numbers(gold), found["cosine_scores"], gold)


def _classification(task: Any, data: Any, found: list[list[Any]]) -> _Rows | None:
    if task.metadata.main_score != "accuracy" or task.is_cross_validation:
        return None
    labels = list(data[task.label_column_name])
    right = [[float(guess == label) for guess, label in zip(guesses, labels, strict=True)] for guesses in found]
    return _Rows("accuracy", MEAN, _numbers(labels), [sum(own) / len(own) for own in zip(*right, strict=True)])


def _numbers(rows: Sequence[Any]) -> list[str]:
    return [str(number) for number in range(len(rows))]


_SCORED: tuple[tuple[type[AbsTask], Any], ...] = (
    (AbsTaskRetrieval, _retrieval),
    (AbsTaskSTS, _sts),
    (AbsTaskPairClassification, _pairs),
    (AbsTaskClassification, _classification),
)
