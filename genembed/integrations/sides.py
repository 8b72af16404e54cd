"""Queries and documents as lists of numbers, for frameworks that keep the two apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from genembed.embedder import Embedder
from genembed.halting import HaltingRule


@dataclass(frozen=True, eq=False)
class Sides:
    """An embedder whose two sides are one call each, from any thread.

    An embedder works for one thread at a time, and frameworks call from several: the calls wait for one another. Give each embedder to
    one framework object alone.
    """

    embedder: Embedder
    query_instruction: str | None = None
    """What queries are embedded for; the model's own instruction if None."""
    document_instruction: str | None = None
    """What documents are embedded for; the model's own instruction if None."""
    halt: HaltingRule | None = None
    """When a text is finished; the model's own rule if None."""
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def queries(self, texts: Sequence[str]) -> list[list[float]]:
        """Embed queries, as unit vectors."""
        with self._lock:
            return self.embedder.encode_query(list(texts), instruction=self.query_instruction, halt=self.halt).tolist()  # type: ignore[no-any-return]

    def documents(self, texts: Sequence[str]) -> list[list[float]]:
        """Embed documents, as unit vectors."""
        with self._lock:
            return self.embedder.encode_document(list(texts), instruction=self.document_instruction, halt=self.halt).tolist()  # type: ignore[no-any-return]
