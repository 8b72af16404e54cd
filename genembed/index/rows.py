"""The rows of an index as a whole: those an update keeps, and what the description says of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from genembed.index.description import passages_hash
from genembed.index.passages import Passage
from genembed.index.plan import Plan
from genembed.index.table import arrow_table, metadata_types, read_columns


def kept_rows(table: Any, plan: Plan, passages: Sequence[Passage], types: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the rows of passages that get the vectors of rows which are there.

    Args:
        table: As it is before the update.
        plan: What the update has to do.
        passages: All of them, as the plan counts them.
        types: Types of the columns of metadata.
    """
    source = {**plan.moved, **plan.copied}
    if not source:
        return
    wanted = table.take_row_ids(list(dict.fromkeys(source.values())))
    old = {row["_rowid"]: row for row in wanted.select(["vector", "steps", "truncated", *types]).with_row_id().to_list()}
    new = []
    for number, row in source.items():
        keeps = number in plan.moved and not passages[number].metadata
        new.append(replace(passages[number], metadata={name: old[row][name] for name in types}) if keeps else passages[number])
    kept = table.schema.field("vector").type.value_type.to_pandas_dtype()
    vectors = np.asarray([old[row]["vector"] for row in source.values()], dtype=kept)
    steps, truncated = (np.asarray([old[row][name] for row in source.values()]) for name in ("steps", "truncated"))
    yield arrow_table(new, vectors, steps, truncated, types=types)


def contents(table: Any) -> dict[str, Any]:
    """Return what the description says about the rows of a table."""
    columns = read_columns(table, ["reference", "text", "steps"])
    texts, references, steps = (columns[name].to_pylist() for name in ("text", "reference", "steps"))
    return {
        "passages": passages_hash([Passage(text, reference, "") for text, reference in zip(texts, references, strict=True)]),
        "rows": len(texts),
        "steps": float(np.mean(steps)) if steps else 0.0,
        "metadata": {name: str(kind) for name, kind in metadata_types(table).items()},
        "version": table.version,
    }
