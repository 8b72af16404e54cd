"""The loop over exported graphs: the steps in onnxruntime, pooling and halting here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from genembed.checkpoint import load_tokenizer
from genembed.decode import Refined
from genembed.embedder import Refinement, similarity, warn_truncated
from genembed.errors import CheckpointError, ConfigurationError, InputError, missing_extra
from genembed.halting import FixedSteps, HaltingRule
from genembed.precision import RANGES_FILE, OutputForm, Precision, form_of, ranges_from_json
from genembed.settings import ModelSettings
from genembed.source import EXPORT_FILE, SETTINGS_FILE, read_json
from genembed.tokens import PromptTokenizer, TokenBatch

_BATCH_TOKENS = 8_192
"""Padded prompt tokens in one batch."""


class OnnxRows:
    """Padded rows whose keys and values onnxruntime has computed."""

    def __init__(self, model: OnnxEmbedder, batch: TokenBatch) -> None:
        self.model = model
        self.mask = batch.mask.numpy()
        self.next_position = self.mask.sum(-1)
        feed = {"input_ids": batch.input_ids.numpy(), "mask": self.mask, "positions": batch.positions.numpy()}
        last, mean, *self.kept = model.prefill.run(None, feed)
        self.last_hidden, self.mean_hidden = torch.from_numpy(last), torch.from_numpy(mean)

    def generate(self) -> None:
        """Go on by one soft token in every row."""
        step = self.model.step
        assert step is not None
        self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=True)
        state = {"last_hidden": self.last_hidden.numpy(), "mask": self.mask, "positions": self.next_position}
        names = [given.name for given in step.get_inputs()][len(state) :]
        last, *self.kept = step.run(None, state | dict(zip(names, self.kept, strict=True)))
        self.last_hidden = torch.from_numpy(last)
        self.next_position = self.next_position + 1

    def select(self, keep: Int[Tensor, "kept"]) -> None:
        """Keep only the rows `keep`, in that order."""
        rows = keep.numpy()
        self.mask, self.next_position, self.last_hidden = self.mask[rows], self.next_position[rows], self.last_hidden[keep]
        self.kept = [values[rows] for values in self.kept]


class OnnxEmbedder:
    """A model that `genembed convert --to onnx` wrote, run by onnxruntime; its methods are those of `Embedder`.

    Args:
        folder: The exported model.
        providers: Execution providers of onnxruntime, the preferred one first.

    Raises:
        MissingExtraError: If onnxruntime is not installed.
        CheckpointError: If the folder is no exported model.
    """

    def __init__(self, folder: str | Path, *, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.folder = Path(folder)
        if not (self.folder / EXPORT_FILE).is_file():
            raise CheckpointError(
                f"{self.folder}: no {EXPORT_FILE}, so this is no exported model; make one: genembed convert MODEL OUT --to onnx"
            )
        self.description = read_json(self.folder / EXPORT_FILE)
        settings = self.folder / SETTINGS_FILE
        self.settings = ModelSettings.from_json(read_json(settings), source=str(settings))
        self.tokenizer = PromptTokenizer(load_tokenizer(self.folder), self.settings)
        ranges = self.folder / RANGES_FILE
        self.ranges = ranges_from_json(read_json(ranges), source=str(ranges)) if ranges.is_file() else {}
        self.prefill = _session(self.folder / "prefill.onnx", providers)
        step = self.folder / "step.onnx"
        self.step = _session(step, providers) if step.is_file() else None

    def __repr__(self) -> str:
        """Show where the model comes from and how it halts."""
        return f"OnnxEmbedder({str(self.folder)!r}, dimensions={self.get_embedding_dimension()}, halt={self.settings.halt})"

    def get_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return int(self.description["dimensions"])

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Embed texts as they are, or under an instruction, as `Embedder.encode` does.

        Args:
            texts: Texts; a single string gives a single vector.
            instruction: What the embedding is for; without one the texts are read bare.
            precision: In which numbers the vectors are given.
            truncate_dim: Keep so many leading dimensions.
            **options: `halt`, `steps` and `truncate`, as for `refine`.
        """
        form = self.form(precision, truncate_dim)
        vectors = self.refine([texts] if isinstance(texts, str) else texts, instruction=instruction, **options).vectors
        return form(vectors[0] if isinstance(texts, str) else vectors)

    def encode_query(self, texts: str | Sequence[str], *, instruction: str | None = None, **options: Any) -> np.ndarray:
        """Embed queries under an instruction, the model's own one if none is given."""
        return self.encode(texts, instruction=self.settings.query_instruction if instruction is None else instruction, **options)

    def encode_document(self, texts: str | Sequence[str], *, instruction: str | None = None, **options: Any) -> np.ndarray:
        """Embed documents; bare for most models, as they were trained."""
        return self.encode(texts, instruction=self.settings.document_instruction if instruction is None else instruction, **options)

    def form(self, precision: Precision = "float32", truncate_dim: int | None = None) -> OutputForm:
        """Return the form vectors are given away in, as `Embedder.form` does."""
        return form_of(
            precision, truncate_dim, hidden=self.get_embedding_dimension(), trained=self.settings.matryoshka_dims, ranges=self.ranges
        )

    def similarity(
        self, queries: Float[np.ndarray, "*queries hidden"], documents: Float[np.ndarray, "*documents hidden"]
    ) -> Float[np.ndarray, "queries documents"]:
        """Return the cosine of every query with every document; a single vector counts as one row."""
        return similarity(queries, documents)

    def refine(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        halt: HaltingRule | None = None,
        steps: int | None = None,
        truncate: Literal["right", "error"] = "right",
    ) -> Refinement:
        """Refine texts and tell what happened to each of them.

        Args:
            texts: Texts.
            instruction: What the embedding is for; put before each text by the model's template.
            halt: When a text is finished; the model's own rule if None.
            steps: Short for `halt=FixedSteps(steps)`.
            truncate: Cut texts that are too long from the right and flag them, or refuse them (`error`).

        Raises:
            InputError: If a text cannot be embedded, or is too long with `truncate="error"`; the message has its row.
            ConfigurationError: If the model cannot follow the halting rule.
            NonFiniteError: If an embedding came out non-finite or zero.
        """
        if halt is not None and steps is not None:
            raise ConfigurationError(f"halt={halt} and steps={steps} both say when to stop; give one of them.")
        rule = FixedSteps(steps) if steps is not None else halt if halt is not None else self.settings.halt
        tokenised = self.tokenizer(list(texts), instruction)
        if truncate == "error" and tokenised.truncated.any():
            row = int(tokenised.truncated.argmax())
            raise InputError(f"row {row}: the text does not fit into {self.settings.max_length} tokens; shorten it.", row=row)
        self._check(rule, int(tokenised.tokens.max(initial=0)))
        result = Refinement(
            vectors=np.zeros((len(texts), self.get_embedding_dimension()), np.float32),
            steps=np.zeros(len(texts), np.int64),
            stability=np.full((len(texts), max(rule.max_steps - 1, 0)), np.nan, np.float32),
            trajectory=None,
            tokens=tokenised.tokens,
            truncated=tokenised.truncated,
        )
        for index in _batches(tokenised.tokens):
            batch = TokenBatch.pad([tokenised.ids[row] for row in index], index=index, side=self.settings.padding_side)
            for done in self._run(batch, rule):
                done.check()
                result.vectors[done.index], result.steps[done.index] = done.vectors, done.steps
                result.stability[done.index] = done.stability
        warn_truncated(result, longest=tokenised.longest, max_length=self.settings.max_length)
        return result

    @torch.no_grad()
    def _run(self, batch: TokenBatch, rule: HaltingRule) -> Iterator[Refined]:
        """Refine one batch; rows that halt leave it."""
        rows, pooling = OnnxRows(self, batch), self.settings.pooling
        progress = pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=rule.window)
        stability = torch.full((len(progress), max(rule.max_steps - 1, 0)), torch.nan)
        while True:
            finished = rule(progress)
            if finished.any():
                left = progress.select(finished.nonzero()[:, 0])
                yield Refined(left.index.numpy(), left.embedding.float().numpy(), left.step.numpy(), stability[finished].numpy(), None)
                keep = (~finished).nonzero()[:, 0]
                progress, stability = progress.select(keep), stability[keep]
                if not len(progress):
                    return
                rows.select(keep)
            rows.generate()
            progress, cosine = pooling.advance(progress, rows.last_hidden)
            if (step := int(progress.step[0])) > 1:
                stability[:, step - 2] = cosine

    def _check(self, rule: HaltingRule, longest: int) -> None:
        """Refuse a rule that this model cannot follow, or has no positions for."""
        self.settings.check_halt(rule)
        if rule.max_steps > 0 and self.step is None:
            raise ConfigurationError(
                f"halt={rule}: the exported model has no head to generate with, so it is read in one pass: FixedSteps(0)."
            )
        limit = self.description["max_positions"]
        if limit is not None and longest + rule.max_steps > limit:
            raise ConfigurationError(
                f"{longest} prompt tokens and {rule.max_steps} steps need {longest + rule.max_steps} positions, but this model has "
                f"{limit}; shorten the texts or use fewer steps."
            )


def _session(path: Path, providers: Sequence[str]) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise missing_extra("onnx", "onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; the rest speaks of the graph's insides
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def _batches(tokens: Int[np.ndarray, "texts"]) -> Iterator[list[int]]:
    """Cut texts, sorted by length, into batches of a bounded number of padded tokens."""
    order = np.argsort(-tokens, kind="stable").tolist()
    while order:
        rows = max(1, _BATCH_TOKENS // max(1, int(tokens[order[0]])))
        yield order[:rows]
        order = order[rows:]
