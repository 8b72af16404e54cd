"""mteb's tasks: by name from the hub, or made of sets on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mteb
from datasets import Dataset, DatasetDict  # type: ignore[import-untyped, unused-ignore]
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskClustering, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata, TaskType

from genembed.errors import ConfigurationError
from genembed.evaluate.local import Columns, Kind, LocalSet

_TASKS: dict[Kind, tuple[type[AbsTask], TaskType, str]] = {
    "retrieval": (AbsTaskRetrieval, "Retrieval", "ndcg_at_10"),
    "sts": (AbsTaskSTS, "STS", "cosine_spearman"),
    "pairs": (AbsTaskPairClassification, "PairClassification", "max_ap"),
    "classification": (AbsTaskClassification, "Classification", "accuracy"),
    "clustering": (AbsTaskClustering, "Clustering", "v_measure"),
}
"""mteb's class, its name of the type, and the main score, as in its own tasks."""


def tasks_of_benchmark(name: str) -> list[AbsTask]:
    """Return the tasks of a benchmark by mteb's name of it, such as `MTEB(eng, v2)`.

    Raises:
        ConfigurationError: If mteb has no benchmark of that name.
    """
    return list(_known("--benchmark", name, mteb.get_benchmark).tasks)


def named_tasks(names: Sequence[str]) -> list[AbsTask]:
    """Return tasks by mteb's names of them.

    Raises:
        ConfigurationError: If mteb has no task of a name.
    """
    return [_known("--task", name, mteb.get_task) for name in names]


def _known(option: str, name: str, look_up: Callable[[str], Any]) -> Any:
    try:
        return look_up(name)
    except (KeyError, ValueError) as error:
        reason = str(error.args[0] if error.args else error).rstrip(".")
        raise ConfigurationError(f"{option} {name}: mteb {mteb.__version__} has none of that name ({reason}).") from error


def local_task(data: LocalSet) -> AbsTask:
    """Make an mteb task of a set on disk; it is scored as mteb scores its own of that kind.

    A clustering takes all its texts, where mteb by default embeds a 25th of them.
    """
    kind, kind_name, main_score = _TASKS[data.kind]
    metadata = TaskMetadata(
        dataset={"path": f"local/{data.name}", "revision": data.fingerprint[:12]},
        name=data.name,
        description=f"{data.name}, from a file.",
        type=kind_name,
        category="t2c" if data.kind in ("classification", "clustering") else "t2t",
        eval_splits=[data.split],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )
    made: Any = {"metadata": metadata}
    if data.kind == "clustering":
        made |= {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": min(16_384, len(data.rows["text"]))}
    task: Any = type("LocalTask", (kind,), made)()
    task.dataset, task.data_loaded = _CONTENT[data.kind](data), True
    return task  # type: ignore[no-any-return]


def _retrieval(data: LocalSet) -> dict[str, Any]:
    found = data.retrieval
    assert found is not None
    documents, queries = (
        Dataset.from_dict({"id": list(texts), "text": list(texts.values())}) for texts in (found.documents, found.queries)
    )
    split = {"corpus": documents, "queries": queries, "relevant_docs": found.relevant, "top_ranked": None}
    return {"default": {data.split: split}}


def _sts(data: LocalSet) -> DatasetDict:
    return DatasetDict({data.split: Dataset.from_dict({**data.rows, "score": [float(score) for score in data.rows["score"]]})})


def _pairs(data: LocalSet) -> DatasetDict:
    texts = {name: column for name, column in data.rows.items() if name != "label"}
    return DatasetDict({data.split: Dataset.from_dict({**texts, "labels": [int(label) for label in data.rows["label"]]})})


def _classification(data: LocalSet) -> DatasetDict:
    numbers = _numbers(data.train)
    return DatasetDict(
        {split: Dataset.from_dict(_numbered(rows, numbers)) for split, rows in (("train", data.train), (data.split, data.rows))}
    )


def _clustering(data: LocalSet) -> DatasetDict:
    rows = _numbered(data.rows, _numbers(data.rows))
    return DatasetDict({data.split: Dataset.from_dict({"sentences": rows["text"], "labels": rows["label"]})})


def _numbers(rows: Columns) -> dict[str, int]:
    """Number the labels, in the order of their names: mteb's binary scores want 0 and 1."""
    return {label: number for number, label in enumerate(sorted({str(label) for label in rows["label"]}))}


def _numbered(rows: Columns, numbers: dict[str, int]) -> Columns:
    return {"text": rows["text"], "label": [numbers[str(label)] for label in rows["label"]]}


_CONTENT: dict[Kind, Callable[[LocalSet], Any]] = {
    "retrieval": _retrieval,
    "sts": _sts,
    "pairs": _pairs,
    "classification": _classification,
    "clustering": _clustering,
}
