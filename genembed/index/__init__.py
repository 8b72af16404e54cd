"""A searchable folder of texts and vectors: a LanceDB table, and a note of the model that made it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from genembed.embedder import Embedder
from genembed.errors import ConfigurationError, GenembedWarning, TextError
from genembed.files import make_durable, replacing_folder
from genembed.fingerprint import absolute, fingerprint, is_fingerprint, origin
from genembed.halting import HaltingRule
from genembed.index import table as tables
from genembed.index.approximate import make_approximation, measured
from genembed.index.description import (
    DESCRIPTION_FILE,
    Approximation,
    Description,
    check_target,
    damaged,
    passages_hash,
    read_description,
    write_description,
)
from genembed.index.known import KnownVectors
from genembed.index.passages import Passage, docstring_passage, read_passages
from genembed.index.plan import SHOWN_COLUMNS, plan_update
from genembed.index.rows import contents, kept_rows
from genembed.index.stored import Stored
from genembed.index.table import Hit
from genembed.precision import OutputForm

__all__ = [
    "DESCRIPTION_FILE",
    "Approximation",
    "Changes",
    "Description",
    "Hit",
    "Index",
    "Passage",
    "check_target",
    "docstring_passage",
    "passages_hash",
    "read_passages",
]

_NEVER = timedelta(days=36_500)
_KEPT = timedelta(days=1)
"""How long an earlier version of the table stays for those who are reading it."""
_ROWS_AT_ONCE = 10_000
"""Rows that one statement deletes."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What an update did, in numbers of passages."""

    embedded: int
    """Texts that the index did not have."""
    copied: int
    """Texts that it had from elsewhere; their vectors were copied."""
    moved: int
    """Passages whose place or metadata have changed; they keep their vectors."""
    removed: int
    unchanged: int


class Index:
    """A folder of embedded texts. Made by `Index.build` or `Index.open`."""

    def __init__(self, folder: Path, description: Description, table: Any) -> None:
        self.folder = folder
        self.description = description
        self._table = table
        there = set(table.schema.names)  # an index of before files were noted lacks some
        self._shown = [name for name in ("reference", "summary", "text", "path", "kind", *description.metadata) if name in there]

    def __len__(self) -> int:
        """Return the number of texts."""
        return self.description.rows

    @classmethod
    def build(
        cls,
        folder: str | Path,
        embedder: Embedder | KnownVectors,
        passages: Sequence[Passage],
        *,
        instruction: str | None = None,
        halt: HaltingRule | None = None,
        truncate: Literal["right", "error"] = "right",
        ann: bool = False,
        form: OutputForm | None = None,
        overwrite: bool = False,
        show_progress_bar: bool = False,
    ) -> Index:
        """Embed texts as documents and store them in a new folder, which appears only when it is complete.

        Args:
            folder: Where the index goes; the folder above it must exist.
            embedder: The model; searching needs the same one.
            passages: The texts.
            instruction: What the vectors are for; the model's own one for documents if None.
            halt: When a text is finished; the model's own rule if None.
            truncate: Cut texts that are too long from the right, or refuse them (`error`).
            ann: Make an approximate index of the vectors as well, for many texts; its recall is measured and noted.
            form: In which the vectors are kept, as `embedder.form("int8")`; all dimensions in float32 if None.
            overwrite: Replace the index that is there; nobody else may be changing it.
            show_progress_bar: Show a bar on stderr when the work takes more than a second.

        Raises:
            ConfigurationError: If the folder is taken or cannot be written, or somebody else changes the index that is there.
            InputError: If a text cannot be embedded, with its row, or a column of metadata is not of one type.
        """
        settings = embedder.settings
        instruction = settings.document_instruction if instruction is None else instruction
        folder = Path(folder)
        check_target(folder, overwrite=overwrite)
        stored = Stored.of(form, ann=ann)
        with tables.alone(folder), replacing_folder(folder) as temporary:
            begin = time.perf_counter()
            with _naming(passages):
                done = embedder.refine(
                    [passage.text for passage in passages],
                    instruction=instruction,
                    halt=halt,
                    truncate=truncate,
                    show_progress_bar=show_progress_bar,
                )
            seconds = time.perf_counter() - begin
            table = tables.create_table(temporary, tables.arrow_table(passages, stored(done.vectors), done.steps, done.truncated))
            description = Description(
                dimensions=embedder.get_embedding_dimension(),
                halt=repr(settings.halt if halt is None else halt),
                instruction=instruction,
                fingerprint=fingerprint(embedder),
                seconds=seconds,
                approximation=make_approximation(table) if ann else None,
                stored=stored,
                **contents(table),
                **origin(embedder.source),
            )
            write_description(temporary, description)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open the index in a folder.

        Raises:
            ConfigurationError: If there is none, or a newer genembed made it.
            CheckpointError: If its files do not belong together.
        """
        folder = Path(folder)
        description = read_description(folder)
        try:
            table = tables.open_table(folder, description.version)
            rows = table.count_rows()
        except (OSError, ValueError, RuntimeError) as error:
            raise damaged(folder, error) from error
        if rows != description.rows:
            raise damaged(folder, f"{DESCRIPTION_FILE} says {description.rows} rows, and there are {rows}")
        return cls(folder, description, table)

    def check(self, embedder: Embedder | KnownVectors) -> None:
        """Refuse a model other than the one that made the index.

        Raises:
            ConfigurationError: With both names and the way out.
        """
        if not is_fingerprint(self.description.fingerprint, embedder):
            other = f"{absolute(embedder.source.name)!r} ({embedder.get_embedding_dimension()} dimensions)"
            raise ConfigurationError(
                f"{self.folder}: made by the model {self.description.model!r} ({self.description.dimensions} dimensions); those of "
                f"{other}, as its weights, tokenizer and settings are now, do not compare with its own: search with the model that made "
                "it, or build the index again with --overwrite."
            )

    def update(
        self,
        embedder: Embedder | KnownVectors,
        passages: Sequence[Passage],
        *,
        prune: Sequence[str | Path] = (),
        unread: Sequence[str | Path] = (),
        halt: HaltingRule | None = None,
        truncate: Literal["right", "error"] = "right",
        ann: bool = False,
        show_progress_bar: bool = False,
    ) -> Changes:
        """Add passages; only texts that the index does not have are embedded, under the instruction of the others.

        The description is replaced last, in one instant: an update that is killed leaves the index as it was.

        Args:
            embedder: The model that made the index.
            passages: What the index has to hold.
            prune: Files and folders; passages of theirs that are not among `passages` are removed. Otherwise nothing is removed.
            unread: Files and folders that could not be read, as `read_passages` notes them; their passages stay, with a warning.
            halt: When a text is finished; must be the rule of the others; the model's own rule if None.
            truncate: Cut texts that are too long from the right, or refuse them (`error`).
            ann: Make an approximate index of the vectors. One that is there is brought up to date in any case.
            show_progress_bar: Show a bar on stderr when the work takes more than a second.

        Raises:
            ConfigurationError: If model, rule or metadata are others than those of the index, or somebody else changes it or has done so.
            InputError: If a text cannot be embedded; the message has its row.
        """
        with tables.alone(self.folder):
            self._check_changeable()
            self.check(embedder)
            self._check_rule(embedder.settings.halt if halt is None else halt)
            self.description.stored.check_approximation(ann)
            types = tables.metadata_types(self._table)
            stored = tables.read_columns(self._table, [*SHOWN_COLUMNS, *types]).to_pydict()
            plan = plan_update(stored, passages, metadata=list(types), prune=map(str, prune), unread=map(str, unread))
            new = [passages[number] for number in plan.embed]
            begin = time.perf_counter()
            with _naming(new):
                done = embedder.refine(
                    [passage.text for passage in new],
                    instruction=self.description.instruction,
                    halt=halt,
                    truncate=truncate,
                    show_progress_bar=show_progress_bar,
                )
            seconds = time.perf_counter() - begin
            if plan or ann:
                rows = [
                    tables.arrow_table(new, self.description.stored(done.vectors), done.steps, done.truncated, types=types),
                    *kept_rows(self._table, plan, passages, types),
                ]
                self._change([*plan.moved.values(), *plan.gone], [part for part in rows if len(part)], seconds=seconds, ann=ann)
        _warn_of_kept(self.folder, len(plan.kept))
        return Changes(
            embedded=len(new),
            copied=len(plan.copied),
            moved=len(plan.moved),
            removed=len(plan.gone),
            unchanged=len(passages) - len(new) - len(plan.copied) - len(plan.moved),
        )

    def delete(self, where: str) -> int:
        """Remove the texts that a filter finds, and return their number; as with `update`, all of it happens or nothing.

        Args:
            where: Condition of SQL over the index's columns.

        Raises:
            ConfigurationError: If the filter does not work, or somebody else changes the index or has done so.
        """
        with tables.alone(self.folder):
            self._check_changeable()
            with tables.answering(self.folder, where):
                rows = self._table.search().where(where).select([]).with_row_id(True).limit(None).to_arrow()["_rowid"].to_pylist()
            if rows:
                self._change(rows, [], seconds=0.0, ann=False)
        return len(rows)

    def search(self, vector: Float[np.ndarray, "hidden"], *, k: int = 10, where: str | None = None, exact: bool = False) -> list[Hit]:
        """Return the `k` texts whose vectors have the highest cosine with a query's, best first.

        Every vector is compared, unless the index has an approximate index of them.

        Args:
            vector: The query's vector; its length does not matter.
            k: Number of texts.
            where: Condition of SQL over the index's columns; only texts that meet it are searched.
            exact: Compare every vector in any case.

        Raises:
            ConfigurationError: If `k` is not positive, the vector has another length, or the filter does not work.
        """
        found = self._nearest(vector, k, where=where, exact=exact, columns=self._shown)
        return self._hits(found, [1.0 - distance for distance in found["_distance"].to_pylist()])

    def nearest(
        self, vector: Float[np.ndarray, "hidden"], *, k: int = 10, where: str | None = None, exact: bool = False
    ) -> tuple[int, ...]:
        """Return the row ids of what `search` finds; cheaper where the texts are not needed."""
        return tuple(self._nearest(vector, k, where=where, exact=exact, columns=[])["_rowid"].to_pylist())

    def search_lexical(self, query: str, *, k: int = 10, where: str | None = None) -> list[Hit]:
        """Return the `k` texts with the highest BM25 score for the words of a query, best first; no vector is compared.

        Words are stemmed as English ones, and the commonest of them are left out, as LanceDB does it. Arguments and errors are those
        of `search`.
        """
        _check_hits(k)
        with tables.answering(self.folder, where):
            found = tables.lexical(self._table, query, k, where=where, columns=self._shown)
        return self._hits(found, found["_score"].to_pylist())

    def search_hybrid(
        self, vector: Float[np.ndarray, "hidden"], query: str, *, k: int = 10, where: str | None = None, exact: bool = False
    ) -> list[Hit]:
        """Return the `k` texts that come first when the lists by vector and by words are joined by their ranks, best first.

        Arguments and errors are those of `search`; `query` is the text of the vector.
        """
        self._check_query(vector, k)
        with tables.answering(self.folder, where):
            approximate, stored = self._approximate(exact=exact), self.description.stored
            found = tables.hybrid(self._table, vector, query, k, where=where, approximate=approximate, columns=self._shown, stored=stored)
        return self._hits(found, found["_relevance_score"].to_pylist())

    def _nearest(self, vector: np.ndarray, k: int, *, where: str | None, exact: bool, columns: Sequence[str]) -> Any:
        self._check_query(vector, k)
        with tables.answering(self.folder, where):
            approximate, stored = self._approximate(exact=exact), self.description.stored
            return tables.nearest(self._table, vector, k, where=where, approximate=approximate, columns=columns, stored=stored)

    def _hits(self, found: Any, scores: Sequence[float]) -> list[Hit]:
        own, kept = [name for name in self._shown if name not in self.description.metadata], self.description.metadata
        return [
            Hit(float(score), **{name: row[name] or "" for name in own}, metadata={name: row[name] for name in kept})
            for score, row in zip(scores, found.to_pylist(), strict=True)
        ]

    def _approximate(self, *, exact: bool) -> bool:
        return self.description.approximation is not None and not exact

    def _check_query(self, vector: np.ndarray, k: int) -> None:
        _check_hits(k)
        if vector.shape != (self.description.dimensions,):
            raise ConfigurationError(
                f"a query vector of shape {vector.shape} does not compare with {self.description.dimensions} dimensions; use the model "
                f"that made the index: {self.description.model}."
            )

    def _check_changeable(self) -> None:
        if "content_hash" not in self._table.schema.names:
            raise ConfigurationError(f"{self.folder}: made before indexes could be changed; build it again with --overwrite.")
        if read_description(self.folder) != self.description:
            raise ConfigurationError(f"{self.folder}: somebody else has changed the index meanwhile; nothing was done, do it again.")

    def _check_rule(self, halt: HaltingRule) -> None:
        if repr(halt) != self.description.halt:
            raise ConfigurationError(
                f"{self.folder}: its texts were refined under {self.description.halt}, and {halt!r} gives others; use the same rule, or "
                "build the index again with --overwrite."
            )

    def _change(self, remove: Sequence[int], add: Sequence[Any], *, seconds: float, ann: bool) -> None:
        """Write a later version of the table, and then the description that makes it the index."""
        self._check_changeable()  # the folder may be another one since, and nothing is to be written into that
        before = self.description
        with tables.changing(self.folder):
            table = tables.writable_table(self.folder, before.version)
            for first in range(0, len(remove), _ROWS_AT_ONCE):
                table.delete(f"_rowid IN ({', '.join(map(str, remove[first : first + _ROWS_AT_ONCE]))})")
            for rows in add:
                table.add(rows)
            table.optimize(cleanup_older_than=_NEVER)  # the indexes learn of the new rows; what others read stays
            approximation = make_approximation(table) if ann else None if before.approximation is None else measured(table)
            make_durable(self.folder)
        after = replace(before, seconds=before.seconds + seconds, approximation=approximation, **contents(table))
        self._check_changeable()
        write_description(self.folder, after)
        self.description, self._table = after, table
        with suppress(OSError, RuntimeError):  # the index is complete; what cannot be deleted now goes with the next change
            table.optimize(cleanup_older_than=_KEPT)


@contextmanager
def _naming(passages: Sequence[Passage]) -> Iterator[None]:
    """Say which passage the row of an error belongs to."""
    try:
        yield
    except TextError as error:
        where = "" if error.row is None else f"{passages[error.row].reference}: "
        raise type(error)(f"{where}{error}", row=error.row) from error


def _warn_of_kept(folder: Path, rows: int) -> None:
    if rows:
        warnings.warn(
            f"{folder}: {rows} passages stay and are not pruned, as their files or folders could not be read now; make those "
            "readable and update again, or remove the passages with --delete.",
            GenembedWarning,
            stacklevel=3,
        )


def _check_hits(k: int) -> None:
    if k < 1:
        raise ConfigurationError(f"k={k}: at least one hit has to be asked for.")
