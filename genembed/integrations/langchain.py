"""An embedder as LangChain's `Embeddings`."""

from __future__ import annotations

from genembed.embedder import Embedder
from genembed.errors import missing_extra
from genembed.halting import HaltingRule
from genembed.integrations.sides import Sides

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    raise missing_extra("langchain", "langchain-core") from error


class GenembedEmbeddings(Embeddings):
    """Queries under the query instruction, documents under the document instruction.

    The asynchronous methods are LangChain's own: they run these in a thread, one at a time.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        halt: HaltingRule | None = None,
    ) -> None:
        """Wrap an embedder.

        Args:
            embedder: The model.
            query_instruction: What queries are embedded for; the model's own instruction if None.
            document_instruction: What documents are embedded for; the model's own instruction if None.
            halt: When a text is finished; the model's own rule if None.
        """
        self._sides = Sides(embedder, query_instruction, document_instruction, halt)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        return self._sides.queries([text])[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents."""
        return self._sides.documents(texts)
