"""An embedder as LlamaIndex's `BaseEmbedding`."""

from __future__ import annotations

import asyncio
from typing import Any

from genembed.embedder import Embedder
from genembed.errors import missing_extra
from genembed.halting import HaltingRule
from genembed.integrations.sides import Sides

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
except ModuleNotFoundError as error:
    raise missing_extra("llama-index", "llama-index-core") from error


class GenembedEmbedding(BaseEmbedding):  # type: ignore[misc]  # the library is not typed for us
    """Queries under the query instruction, texts of an index under the document instruction.

    LlamaIndex hands over `embed_batch_size` texts at a time; the engine makes its own batches of them, so larger is faster.
    """

    _sides: Sides = PrivateAttr()

    def __init__(
        self,
        embedder: Embedder,
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        halt: HaltingRule | None = None,
        embed_batch_size: int = 512,
        **options: Any,
    ) -> None:
        """Wrap an embedder.

        Args:
            embedder: The model.
            query_instruction: What queries are embedded for; the model's own instruction if None.
            document_instruction: What texts are embedded for; the model's own instruction if None.
            halt: When a text is finished; the model's own rule if None.
            embed_batch_size: Texts in one call, at most 2048.
            **options: Other fields of `BaseEmbedding`, such as `callback_manager`.
        """
        super().__init__(model_name=embedder.source.name, embed_batch_size=embed_batch_size, **options)
        self._sides = Sides(embedder, query_instruction, document_instruction, halt)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex files the settings."""
        return "GenembedEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._sides.queries([query])[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._sides.documents([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._sides.documents(texts)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
