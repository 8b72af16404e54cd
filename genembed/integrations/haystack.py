"""Embedders as plain callables with the signatures of Haystack's text and document embedders.

Haystack is not imported: a component of its pipelines is any object with `run`, wrapped by its decorator `component`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from genembed.embedder import Embedder
from genembed.errors import InputError
from genembed.halting import HaltingRule
from genembed.integrations.sides import Sides


class TextEmbedder:
    """Embeds one query: `run(text=...)` returns `{"embedding": [...]}`."""

    def __init__(self, embedder: Embedder, *, instruction: str | None = None, halt: HaltingRule | None = None) -> None:
        """Wrap an embedder.

        Args:
            embedder: The model.
            instruction: What the query is embedded for; the model's own query instruction if None.
            halt: When it is finished; the model's own rule if None.
        """
        self._sides = Sides(embedder, query_instruction=instruction, halt=halt)

    def run(self, text: str) -> dict[str, list[float]]:
        """Embed a query."""
        return {"embedding": self._sides.queries([text])[0]}


class DocumentEmbedder:
    """Embeds documents: `run(documents=[...])` returns `{"documents": [...]}`, copies with `embedding` set."""

    def __init__(self, embedder: Embedder, *, instruction: str | None = None, halt: HaltingRule | None = None) -> None:
        """Wrap an embedder.

        Args:
            embedder: The model.
            instruction: What documents are embedded for; the model's own document instruction if None.
            halt: When a document is finished; the model's own rule if None.
        """
        self._sides = Sides(embedder, document_instruction=instruction, halt=halt)

    def run(self, documents: Sequence[Any]) -> dict[str, list[Any]]:
        """Embed documents by their `content`.

        Args:
            documents: Dataclass instances with `content` and `embedding`, as Haystack's `Document`; they stay as they are.

        Raises:
            InputError: If a document has no text; the message has its place.
        """
        for place, document in enumerate(documents):
            if document.content is None:
                raise InputError(
                    f"document {place} has no content, nothing to embed; leave it out, or convert it to text first.", row=place
                )
        vectors = self._sides.documents([document.content for document in documents])
        return {"documents": [dataclasses.replace(one, embedding=vector) for one, vector in zip(documents, vectors, strict=True)]}
