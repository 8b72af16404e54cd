"""The form in which an index keeps its vectors, and the search over codes, which are compared as what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Shaped, UInt64

from genembed.errors import ConfigurationError, missing_extra
from genembed.precision import OutputForm, Ranges

try:
    import pyarrow
except ModuleNotFoundError as missing:
    raise missing_extra("index", "pyarrow") from missing

StoredPrecision = Literal["float32", "float16", "int8", "binary"]
"""Those of `OutputForm` that differ in what is kept; `uint8` and `ubinary` are the same bits under another name."""

_ROWS_AT_ONCE = 8_192
"""Rows whose codes are restored together: 12 MiB of 384 dimensions."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How an index keeps its vectors: how many dimensions, in which numbers, and between which bounds.

    The bounds are those that the model had when the index was built. They stay the index's own: codes mean nothing under others.
    """

    precision: StoredPrecision = "float32"
    dimensions: int | None = None
    """Kept from the front; all if None."""
    minimum: tuple[float, ...] = ()
    """Of each dimension, for int8 alone."""
    maximum: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a form that an index cannot have."""
        if self.precision not in get_args(StoredPrecision):
            raise ConfigurationError(f"precision={self.precision!r}: an index keeps {', '.join(get_args(StoredPrecision))}; choose one.")

    @classmethod
    def of(cls, form: OutputForm | None, *, ann: bool) -> Stored:
        """Return how vectors of this form are kept.

        Args:
            form: Of a model, so that its ranges are the model's own; all dimensions in float32 if None.
            ann: Whether the index gets an approximate index of its vectors.

        Raises:
            ConfigurationError: If an index cannot keep this form, or not together with an approximate index.
        """
        if form is None:
            return cls()
        bounds: dict[str, Any] = {}
        if form.precision == "int8" and form.ranges is not None:
            bounds = {"minimum": tuple(form.ranges.minimum.tolist()), "maximum": tuple(form.ranges.maximum.tolist())}
        stored = cls(precision=form.precision, dimensions=form.dimensions, **bounds)  # type: ignore[arg-type]  # what an index cannot keep is refused there
        stored.check_approximation(ann)
        return stored

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stored:
        """Read what `dataclasses.asdict` made of it."""
        fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
        return cls(**fields)

    def check_approximation(self, ann: bool) -> None:
        """Refuse an approximate index of codes.

        Raises:
            ConfigurationError: With the reason and the way out.
        """
        if ann and self.coded:
            raise ConfigurationError(
                f"--ann: an approximate index is made of numbers, and the vectors are kept as {self.precision} codes; keep them in float16 "
                "or float32 (the approximate index itself takes 8 bits a number), or leave --ann out."
            )

    @property
    def coded(self) -> bool:
        """Whether codes are kept, which are no numbers to compare."""
        return self.precision in ("int8", "binary")

    @cached_property
    def form(self) -> OutputForm | None:
        """The form, with the index's own ranges; None where vectors are kept as they are."""
        if self.dimensions is None:
            return None
        ranges = Ranges(np.asarray(self.minimum, np.float32), np.asarray(self.maximum, np.float32)) if self.minimum else None
        return OutputForm(precision=self.precision, dimensions=self.dimensions, ranges=ranges)

    def __call__(self, vectors: Float[np.ndarray, "texts hidden"]) -> Shaped[np.ndarray, "texts codes"]:
        """Return what is kept of the vectors of texts."""
        return vectors if self.form is None else self.form(vectors)

    def query(self, vector: Float[np.ndarray, "hidden"]) -> Float[np.ndarray, "dimensions"]:
        """Return what a query is compared by: its leading dimensions, in full precision."""
        whole = vector.astype(np.float32)
        return whole if self.dimensions is None else whole[: self.dimensions]


def nearest_codes(
    table: Any, stored: Stored, vector: Float[np.ndarray, "hidden"], k: int, *, where: str | None, columns: Sequence[str]
) -> Any:
    """Return the rows whose restored vectors have the highest cosine with a query's, best first, with `_distance` and `_rowid`.

    The query stays in full precision; products of the codes themselves would be no cosines. Every row that meets the condition is read,
    some thousand at a time, so memory does not grow with the table.

    Args:
        table: Of an index that keeps codes.
        stored: How it keeps them.
        vector: The query's vector.
        k: Number of rows.
        where: Condition of SQL over the columns.
        columns: To be returned beside them.
    """
    form = stored.form
    assert form is not None
    query = stored.query(vector)
    query = query / max(float(np.linalg.norm(query)), 1e-12)
    rows, scores = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.float32)
    search = table.search().select(["vector"]).with_row_id(True).limit(None)
    for batch in (search if where is None else search.where(where)).to_batches(_ROWS_AT_ONCE):
        rows = np.concatenate([rows, batch["_rowid"].to_numpy()])
        scores = np.concatenate([scores, form.restore(_codes(batch["vector"])) @ query])
        best = np.argsort(-scores, kind="stable")[:k]
        rows, scores = rows[best], scores[best]
    found = _take(table, rows, columns)
    return found.append_column("_distance", pyarrow.array(1 - scores, type=pyarrow.float32()))


def _codes(column: Any) -> Shaped[np.ndarray, "rows codes"]:
    return np.asarray(column.flatten().to_numpy().reshape(len(column), -1))


def _take(table: Any, rows: UInt64[np.ndarray, "rows"], columns: Sequence[str]) -> Any:
    """Return columns of these rows, in this order."""
    if not columns or not len(rows):
        names = {name: table.schema.field(name).type for name in columns}
        empty = {name: pyarrow.array([], type=kind) for name, kind in names.items()}
        return pyarrow.table({**empty, "_rowid": pyarrow.array(rows, type=pyarrow.uint64())})
    taken = table.take_row_ids(rows.tolist()).select(list(columns)).with_row_id().to_arrow()
    place = {row: number for number, row in enumerate(taken["_rowid"].to_pylist())}
    return taken.take(pyarrow.array([place[row] for row in rows.tolist()]))
