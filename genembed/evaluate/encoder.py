"""An embedder as mteb sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from mteb.types import PromptType
from torch import Tensor

from genembed.embedder import Embedder
from genembed.evaluate.instructions import Instructions
from genembed.halting import ConvergeStop, FixedSteps, rule_to_json
from genembed.source import sha256 as file_sha256

Vectors = Float[np.ndarray, "... hidden"] | Float[Tensor, "... hidden"]
"""mteb passes arrays and tensors, and single vectors as well."""


@dataclass
class Work:
    """What encoding took since the counts were last taken."""

    texts: int = 0
    steps: int = 0
    """Refinement steps, summed over texts."""
    tokens: int = 0
    """Prompt tokens read."""
    truncated: int = 0
    """Texts that lost their end."""


class Encoder:
    """Follows mteb's `EncoderProtocol`: `mteb.evaluate(Encoder(genembed.load("mini")), tasks)`.

    The halting rule, the source of the instructions and the dtype are `experiment_kwargs` of the metadata, so that mteb files the results
    of different settings apart.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        halt: FixedSteps | ConvergeStop | None = None,
        instructions: Instructions | None = None,
        truncate: Literal["right", "error"] = "right",
    ) -> None:
        """Wrap an embedder.

        Args:
            embedder: The model.
            halt: When a text is finished; the model's own rule if None.
            instructions: What is put before texts; the paper's table if None.
            truncate: Cut texts that are too long from the right, or refuse them.
        """
        self.embedder = embedder
        self.halt = embedder.settings.halt if halt is None else halt
        self.instructions = Instructions() if instructions is None else instructions
        self.truncate: Literal["right", "error"] = truncate
        self.work = Work()
        self.mteb_model_meta = _meta(embedder, self.halt, self.instructions)

    def take_work(self) -> Work:
        """Return the counts since they were last taken."""
        work, self.work = self.work, Work()
        return work

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> Float[np.ndarray, "texts hidden"]:
        """Embed the texts of a task; mteb calls this.

        Args:
            inputs: Batches with a list of texts under `text`; the engine makes its own batches of them.
            task_metadata: Its name says which instruction is used.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: Documents take the instruction of documents, everything else that of queries.
            **_: Options of other encoders, such as `batch_size`.

        Raises:
            ConfigurationError: If the task has no instruction.
            InputError: If a text cannot be embedded.
        """
        instruction = self.instructions.of(task_metadata.name).of(is_document=prompt_type == PromptType.document)
        texts = [text for batch in inputs for text in batch["text"]]
        done = self.embedder.refine(texts, instruction=instruction, halt=self.halt, truncate=self.truncate, show_progress_bar=True)
        self.work.texts += len(texts)
        self.work.steps += int(done.steps.sum())
        self.work.tokens += int(done.tokens.sum())
        self.work.truncated += int(done.truncated.sum())
        return done.vectors

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> Float[Tensor, "queries documents"]:
        """Return the cosine of every vector with every other."""
        return torch.as_tensor(cos_sim(embeddings1, embeddings2))

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> Float[Tensor, "pairs"]:
        """Return the cosines of pairs."""
        return torch.as_tensor(pairwise_cos_sim(embeddings1, embeddings2))


def _meta(embedder: Embedder, halt: FixedSteps | ConvergeStop, instructions: Instructions) -> ModelMeta:
    source, backbone = embedder.source, embedder.backbone
    parameters = list(backbone.model.parameters())
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    hub = source.name.count("/") == 1 and not Path(source.name).exists()
    return ModelMeta(
        loader=None,
        name=source.name if hub else f"genembed/{Path(source.name).resolve().name}",
        revision=revision(embedder),
        release_date=None,
        languages=None,
        n_parameters=sum(parameter.numel() for parameter in parameters),
        memory_usage_mb=sum(parameter.nbytes for parameter in parameters) / 2**20,
        max_tokens=embedder.settings.max_length,
        embed_dim=embedder.get_embedding_dimension(),
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=not instructions.bare,
        training_datasets=None,
        experiment_kwargs={**rule_to_json(halt), "instructions": instructions.label, "dtype": dtype},
    )


def revision(embedder: Embedder) -> str:
    """Hash what decides a model's vectors besides the halting rule: all weights, the tokenizer and the settings.

    Results are filed under it, so that a model that was trained again is evaluated again.
    """
    source = embedder.source
    folders = [folder for folder in (source.base, source.adapter) if folder is not None]
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    files += [path for path in (source.head, source.tokenizer / "tokenizer.json") if path is not None and path.is_file()]
    settings = {name: value for name, value in embedder.settings.to_json().items() if name != "halt"}
    digest = sha256(repr(sorted(settings.items())).encode())
    for path in dict.fromkeys(files):
        digest.update(f"{path.name} {file_sha256(path)}".encode())
    return digest.hexdigest()[:12]
