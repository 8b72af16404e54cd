"""The two-stage baseline (GIRCSE 2025, appendix F): a language model expands each text, then any model reads text and expansion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped, unused-ignore]
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.models_protocols import SearchProtocol
from mteb.types import PromptType
from torch.utils.data import DataLoader

from genembed.errors import ConfigurationError
from genembed.evaluate.expansion import Expander
from genembed.evaluate.instructions import Instructions


@dataclass(frozen=True, eq=False)
class Expansions:
    """Which texts of a task become which, before a model reads them."""

    expander: Expander
    instructions: Instructions
    """What the language model is told of each task; the model that reads keeps its own prompts."""

    def __post_init__(self) -> None:
        """Refuse to tell nothing: the paper's prompt speaks of an instruction."""
        if self.instructions.bare:
            raise ConfigurationError(
                "a language model has to be told what the expansion is for; give an instruction, or the paper's table."
            )

    def instruction(self, task: str, side: PromptType | None) -> str:
        """Return what the language model is told.

        The documents of retrieval have no instruction in the paper's table, and its prompt has no form without one: they are told that
        of the queries, which says what the task is.

        Raises:
            ConfigurationError: If the task has none.
        """
        try:
            found = self.instructions.of(task)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{task}: the paper's tables have no instruction for this task, and the language model of --expand-with needs one; give "
                'it: --instruction "...".'
            ) from error
        told = found.of(is_document=side == PromptType.document) or found.query
        assert told is not None  # only bare instructions lack that of queries
        return told

    def __call__(self, texts: Sequence[str], task: str, side: PromptType | None) -> list[str]:
        """Return each text with its expansion."""
        made = self.expander.expand(texts, self.instruction(task, side))
        return [expansion.after(text) for text, expansion in zip(texts, made, strict=True)]

    def meta(self, own: ModelMeta) -> ModelMeta:
        """Return the metadata of a model, changed so that mteb files its results apart from those without expansions."""
        told = {"expand_with": self.expander.label, "expand_tokens": self.expander.budget, "expand_instructions": self.instructions.label}
        return own.model_copy(update={"experiment_kwargs": {**(own.experiment_kwargs or {}), **told}})


class ExpandedEncoder:
    """Follows mteb's `EncoderProtocol`: an encoder that reads expanded texts."""

    def __init__(self, model: Any, expansions: Expansions) -> None:
        """Wrap an encoder.

        Args:
            model: An `Encoder`, or any other that follows mteb's `EncoderProtocol`.
            expansions: What is put behind each text.
        """
        self.model, self.expansions = model, expansions
        self.mteb_model_meta = expansions.meta(model.mteb_model_meta)

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> Any:
        """Embed the expanded texts of a task; mteb calls this.

        Args:
            inputs: Batches with a list of texts under `text`.
            task_metadata: Its name says which instruction is used.
            prompt_type: The side of the texts.
            **options: Handed on, as `hf_split`, `hf_subset` and `batch_size`.

        Raises:
            ConfigurationError: If the task has no instruction, or the language model no room.
            TextError: If a text cannot be expanded or embedded.
        """
        texts = self.expansions([text for batch in inputs for text in batch["text"]], task_metadata.name, prompt_type)
        # A loader over a data set, as mteb makes it: its wrappers of other models look at the data set's columns.
        loader: Any = DataLoader(Dataset.from_dict({"text": texts}), batch_size=options.get("batch_size", 32))
        return self.model.encode(loader, task_metadata=task_metadata, prompt_type=prompt_type, **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the similarity of every vector with every other, as the encoder takes it."""
        return self.model.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the similarities of pairs, as the encoder takes them."""
        return self.model.similarity_pairwise(embeddings1, embeddings2)


class ExpandedSearch:
    """Follows mteb's `SearchProtocol`: a searcher, as BM25, that reads expanded documents and queries."""

    def __init__(self, model: Any, expansions: Expansions) -> None:
        """Wrap a searcher.

        Args:
            model: One that follows mteb's `SearchProtocol`.
            expansions: What is put behind each text.
        """
        self.model, self.expansions = model, expansions
        self.mteb_model_meta = expansions.meta(model.mteb_model_meta)

    def index(self, corpus: Dataset, *, task_metadata: TaskMetadata, **options: Any) -> None:
        """Index the expanded documents of a task, the title before the text; mteb calls this."""
        texts = _joined(corpus, "title", "text")
        self.model.index(self._expanded(corpus, texts, task_metadata, PromptType.document), task_metadata=task_metadata, **options)

    def search(self, queries: Dataset, *, task_metadata: TaskMetadata, **options: Any) -> Any:
        """Search with the expanded queries of a task, each query's own instruction behind it; mteb calls this."""
        texts = _joined(queries, "text", "instruction")
        return self.model.search(self._expanded(queries, texts, task_metadata, PromptType.query), task_metadata=task_metadata, **options)

    def _expanded(self, rows: Dataset, texts: Sequence[str], task: TaskMetadata, side: PromptType) -> Dataset:
        return Dataset.from_dict({"id": list(rows["id"]), "text": self.expansions(texts, task.name, side)})


def expanded(model: Any, expander: Expander, instructions: Instructions | None = None) -> ExpandedEncoder | ExpandedSearch:
    """Put a language model's expansions behind every text a model reads.

    Args:
        model: Any model that mteb can evaluate.
        expander: The language model.
        instructions: What it is told of each task; the paper's table if None.

    Raises:
        ConfigurationError: If the instructions are none.
    """
    expansions = Expansions(expander, Instructions() if instructions is None else instructions)
    return ExpandedSearch(model, expansions) if isinstance(model, SearchProtocol) else ExpandedEncoder(model, expansions)


def _joined(rows: Dataset, *columns: str) -> list[str]:
    """Join the columns that are there, as BM25 and mteb's encoders read them."""
    parts = [rows[column] for column in columns if column in rows.column_names]
    return [" ".join(part or "" for part in row).strip() for row in zip(*parts, strict=True)]
