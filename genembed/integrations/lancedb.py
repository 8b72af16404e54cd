"""An embedding function of LanceDB: the table remembers the model, and embeds what is added and what is asked.

Importing this file registers it as `genembed`; a table that uses it can be opened wherever it has been imported.
"""

from __future__ import annotations

from typing import Any

from genembed.embedder import load
from genembed.errors import missing_extra
from genembed.halting import FixedSteps
from genembed.integrations.sides import Sides

try:
    from lancedb.embeddings import EmbeddingFunction, register
    from pydantic import PrivateAttr
except ModuleNotFoundError as error:
    raise missing_extra("index", "lancedb") from error


@register("genembed")
class GenembedFunction(EmbeddingFunction):  # type: ignore[misc]  # the library is not typed for us
    """`get_registry().get("genembed").create(name="mini")`; the source column is read as documents, searches as queries.

    Every field is kept in the table's schema, so it is a plain value; the model is loaded when it is first needed.
    """

    name: str = "mini"
    """As for `genembed.load`: a built-in model, a folder, or a hub id."""
    adapter: str | None = None
    preset: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False
    steps: int | None = None
    """Refine every text exactly this many times; by the model's own rule if None."""
    query_instruction: str | None = None
    """What queries are embedded for; the model's own instruction if None."""
    document_instruction: str | None = None
    """What the source column is embedded for; the model's own instruction if None."""
    max_retries: int = 0
    """A local model that fails will fail again; LanceDB would wait and retry seven times."""

    _sides: Sides | None = PrivateAttr(default=None)

    def ndims(self) -> int:
        """Return the length of a vector."""
        return self._loaded().embedder.get_embedding_dimension()

    def compute_query_embeddings(self, query: str, *_: Any, **__: Any) -> list[list[float]]:
        """Embed what is searched for."""
        return self._loaded().queries(self.sanitize_input(query))

    def compute_source_embeddings(self, texts: Any, *_: Any, **__: Any) -> list[list[float]]:
        """Embed the texts of the source column."""
        return self._loaded().documents(self.sanitize_input(texts))

    def _loaded(self) -> Sides:
        if self._sides is None:
            embedder = load(self.name, adapter=self.adapter, preset=self.preset, device=self.device, dtype=self.dtype, offline=self.offline)
            halt = None if self.steps is None else FixedSteps(self.steps)
            self._sides = Sides(embedder, self.query_instruction, self.document_instruction, halt)
        return self._sides
