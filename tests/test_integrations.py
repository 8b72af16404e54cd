"""LangChain, LlamaIndex, Haystack's signatures and LanceDB: queries and documents kept apart, with our vectors."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from genembed import Embedder, FixedSteps, InputError, ModelSettings
from genembed.integrations.haystack import DocumentEmbedder, TextEmbedder
from genembed.integrations.sides import Sides

DOCUMENTS = ["Copy a directory tree.", "Wait until all threads have reached the barrier.", "Alpha-lipoic acid lowers fasting glucose."]
QUERY = "how do I copy a folder?"
STEPS = FixedSteps(3)
SETTINGS = ModelSettings(query_instruction="Find the answer", document_instruction="Read", halt=STEPS)


@pytest.fixture(scope="module")
def embedder(embedder_of: Callable[..., Embedder]) -> Embedder:
    return embedder_of("qwen2", SETTINGS)


@pytest.fixture(scope="module")
def expected(embedder: Embedder) -> SimpleNamespace:
    """Return the library's own vectors."""
    return SimpleNamespace(query=embedder.encode_query(QUERY), documents=embedder.encode_document(DOCUMENTS))


def test_both_sides_have_their_own_instruction_and_a_given_one_wins(embedder: Embedder, expected: SimpleNamespace) -> None:
    sides = Sides(embedder)
    np.testing.assert_array_equal(sides.queries([QUERY]), [expected.query])
    np.testing.assert_array_equal(sides.documents(DOCUMENTS), expected.documents)
    other = Sides(embedder, query_instruction="Other", document_instruction="", halt=FixedSteps(1))
    np.testing.assert_array_equal(other.queries([QUERY]), [embedder.encode(QUERY, instruction="Other", steps=1)])
    np.testing.assert_array_equal(other.documents(DOCUMENTS), embedder.encode(DOCUMENTS, instruction="", steps=1))
    assert np.abs(expected.query - embedder.encode_document(QUERY)).max() > 1e-3


def test_calls_from_several_threads_wait_for_one_another(embedder: Embedder, expected: SimpleNamespace) -> None:
    sides, running, most = Sides(embedder), [0], [0]
    inner = embedder.encode_query

    def counted(texts: Any, **options: Any) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            return inner(texts, **options)
        finally:
            running[0] -= 1

    async def many() -> list[list[list[float]]]:
        return await asyncio.gather(*(asyncio.to_thread(sides.queries, [QUERY]) for _ in range(8)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedder, "encode_query", counted)
        results = asyncio.run(many())
    assert most == [1]
    np.testing.assert_array_equal(np.array(results)[:, 0], np.tile(expected.query, (8, 1)))


def test_langchain_finds_the_documents_of_a_query_sync_and_async(embedder: Embedder, expected: SimpleNamespace) -> None:
    pytest.importorskip("langchain_core", reason="langchain-core is not installed: pip install 'genembed[langchain]'")
    from langchain_core.vectorstores import InMemoryVectorStore

    from genembed.integrations.langchain import GenembedEmbeddings

    embeddings = GenembedEmbeddings(embedder)
    assert embeddings.embed_query(QUERY) == expected.query.tolist()
    assert embeddings.embed_documents(DOCUMENTS) == expected.documents.tolist()
    assert asyncio.run(embeddings.aembed_query(QUERY)) == expected.query.tolist()
    assert asyncio.run(embeddings.aembed_documents(DOCUMENTS)) == expected.documents.tolist()
    store = InMemoryVectorStore.from_texts(DOCUMENTS, embedding=embeddings)
    order = np.argsort(-(expected.documents @ expected.query))
    assert [found.page_content for found in store.similarity_search(QUERY, k=3)] == [DOCUMENTS[place] for place in order]
    given = GenembedEmbeddings(embedder, query_instruction="Other", document_instruction="Other", halt=FixedSteps(1))
    assert given.embed_query(QUERY) == given.embed_documents([QUERY])[0] == embedder.encode(QUERY, instruction="Other", steps=1).tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of LlamaIndex's own imports
def test_llama_index_embeds_queries_and_batches_of_texts_sync_and_async(embedder: Embedder, expected: SimpleNamespace) -> None:
    pytest.importorskip("llama_index.core", reason="llama-index-core is not installed: pip install 'genembed[llama-index]'")
    from genembed.integrations.llama_index import GenembedEmbedding

    model = GenembedEmbedding(embedder, embed_batch_size=2)
    assert model.get_query_embedding(QUERY) == expected.query.tolist()
    np.testing.assert_allclose(model.get_text_embedding(DOCUMENTS[0]), expected.documents[0], atol=1e-6)
    np.testing.assert_allclose(model.get_text_embedding_batch(DOCUMENTS), expected.documents, atol=1e-6)
    assert asyncio.run(model.aget_query_embedding(QUERY)) == expected.query.tolist()
    np.testing.assert_allclose(asyncio.run(model.aget_text_embedding(DOCUMENTS[0])), expected.documents[0], atol=1e-6)
    np.testing.assert_allclose(asyncio.run(model.aget_text_embedding_batch(DOCUMENTS)), expected.documents, atol=1e-6)
    assert (model.class_name(), model.embed_batch_size) == ("GenembedEmbedding", 2)
    assert model.to_dict()["model_name"] == embedder.source.name


@dataclasses.dataclass
class Document:
    """As much of Haystack's document as an embedder touches."""

    content: str | None
    embedding: list[float] | None = None


def test_haystacks_signatures_hold_and_the_documents_given_stay_as_they_are(embedder: Embedder, expected: SimpleNamespace) -> None:
    documents = [Document(text) for text in DOCUMENTS]
    done = DocumentEmbedder(embedder).run(documents=documents)["documents"]
    assert [document.content for document in done] == DOCUMENTS
    np.testing.assert_array_equal([document.embedding for document in done], expected.documents)
    assert [document.embedding for document in documents] == [None, None, None]
    assert TextEmbedder(embedder).run(text=QUERY) == {"embedding": expected.query.tolist()}
    other = TextEmbedder(embedder, instruction="Other", halt=FixedSteps(1)).run(QUERY)["embedding"]
    assert other == DocumentEmbedder(embedder, instruction="Other", halt=FixedSteps(1)).run([Document(QUERY)])["documents"][0].embedding
    with pytest.raises(InputError, match="document 1 has no content"):
        DocumentEmbedder(embedder).run([documents[0], Document(None)])


def test_a_lancedb_table_embeds_what_is_added_and_asked_and_remembers_how(
    folder_of: Callable[[str], Path], tmp_path: Path, embedder: Embedder
) -> None:
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed: pip install 'genembed[index]'")
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    from genembed.integrations.lancedb import GenembedFunction

    options = {"name": str(folder_of("qwen2")), "dtype": "float64", "steps": 3, "query_instruction": "Find the answer"}
    function = get_registry().get("genembed").create(**options)
    assert isinstance(function, GenembedFunction)

    class Row(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(tmp_path).create_table("t", schema=Row)
    table.add([{"text": text} for text in DOCUMENTS])
    kept = json.loads(table.schema.metadata[b"embedding_functions"])[0]
    assert (kept["name"], kept["model"]) == ("genembed", options)
    reopened = lancedb.connect(tmp_path).open_table("t")
    documents, query = embedder.encode(DOCUMENTS), embedder.encode(QUERY, instruction="Find the answer")
    np.testing.assert_allclose(reopened.to_arrow()["vector"].to_pylist(), documents, atol=1e-6)
    found = reopened.search(QUERY).distance_type("cosine").limit(3).to_list()
    order = np.argsort(-(documents @ query))
    assert [row["text"] for row in found] == [DOCUMENTS[place] for place in order]
    np.testing.assert_allclose([row["_distance"] for row in found], 1 - (documents @ query)[order], atol=1e-5)
