"""The public face: load a model, turn texts into vectors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from tqdm import tqdm

from genembed import checkpoint, hub, source
from genembed.budget import DEFAULT_BUDGET, Budget
from genembed.checkpoint import Loaded
from genembed.engine import Engine
from genembed.errors import ConfigurationError, GenembedWarning, InputError
from genembed.halting import FixedSteps, HaltingRule
from genembed.precision import OutputForm, Precision, form_of
from genembed.settings import ModelSettings
from genembed.tokens import Tokenised, check_texts

_WINDOW = 8_192
"""Texts that are tokenised and sorted by length together: memory stays bounded however many there are."""

Vector = Shaped[np.ndarray, "codes"]
Vectors = Shaped[np.ndarray, "texts codes"]


class EncodeOptions(TypedDict, total=False):
    """Keywords of `encode` and its relatives; their meaning is that of `Embedder.refine`."""

    halt: HaltingRule | None
    steps: int | None
    truncate: Literal["right", "error"]
    show_progress_bar: bool


class OutputOptions(EncodeOptions, total=False):
    """Keywords of `encode` and its relatives; the further ones are those of `Embedder.form`."""

    precision: Precision
    truncate_dim: int | None


@dataclass(frozen=True)
class Refinement:
    """What happened to each text, in the caller's order."""

    vectors: Float[np.ndarray, "texts hidden"]
    """Embeddings z_{k*}, float32, unit length."""
    steps: Int[np.ndarray, "texts"]
    """Refinement steps done, k*."""
    stability: Float[np.ndarray, "texts steps_minus_1"]
    """s_2 .. s_K, the cosine of consecutive embeddings, float32; NaN after the halt."""
    trajectory: Float[np.ndarray, "texts steps hidden"] | None
    """z_1 .. z_K, unit vectors, float32, NaN after the halt; None unless asked for."""
    tokens: Int[np.ndarray, "texts"]
    """Prompt tokens read."""
    truncated: Bool[np.ndarray, "texts"]
    """Whether the text lost its end to the model's length limit."""


class Embedder:
    """A model that turns texts into unit vectors by refining them step by step.

    Made by `genembed.load`. Instances are not safe for use from several threads at once.
    """

    def __init__(self, loaded: Loaded, *, budget: Budget = DEFAULT_BUDGET) -> None:
        self.source = loaded.source
        self.settings = loaded.backbone.settings
        self.backbone = loaded.backbone
        self.tokenizer = loaded.tokenizer
        self.ranges = source.ranges_of(loaded.source)
        self.engine = Engine(loaded.backbone, budget)

    def __repr__(self) -> str:
        """Show where the model comes from and how it halts."""
        return f"Embedder({self.source.name!r}, dimensions={self.get_embedding_dimension()}, halt={self.settings.halt})"

    def get_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return self.backbone.hidden_size

    @overload
    def encode(
        self,
        texts: str,
        *,
        instruction: str | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Vector: ...
    @overload
    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Vectors: ...
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray:
        """Embed texts as they are, or under an instruction.

        Args:
            texts: Texts; a single string gives a single vector, as in sentence-transformers.
            instruction: What the embedding is for; without one the texts are read bare.
            precision: In which numbers the vectors are given, as for `form`.
            truncate_dim: Keep so many leading dimensions, as for `form`.
            **options: `halt`, `steps`, `truncate` and `show_progress_bar`, as for `refine`.

        Returns:
            Unit vectors, one for each text, in order: float32, or what `precision` makes of them.
        """
        form = self.form(precision, truncate_dim)
        if isinstance(texts, str):
            return form(np.asarray(self.refine([texts], instruction=instruction, **options).vectors[0]))
        return form(self.refine(texts, instruction=instruction, **options).vectors)

    @overload
    def encode_query(self, texts: str, *, instruction: str | None = None, **options: Unpack[OutputOptions]) -> Vector: ...
    @overload
    def encode_query(self, texts: Sequence[str], *, instruction: str | None = None, **options: Unpack[OutputOptions]) -> Vectors: ...
    def encode_query(self, texts: str | Sequence[str], *, instruction: str | None = None, **options: Unpack[OutputOptions]) -> np.ndarray:
        """Embed queries under an instruction, the model's own one if none is given (see `genembed info`)."""
        return self.encode(texts, instruction=self.settings.query_instruction if instruction is None else instruction, **options)

    @overload
    def encode_document(self, texts: str, *, instruction: str | None = None, **options: Unpack[OutputOptions]) -> Vector: ...
    @overload
    def encode_document(self, texts: Sequence[str], *, instruction: str | None = None, **options: Unpack[OutputOptions]) -> Vectors: ...
    def encode_document(
        self, texts: str | Sequence[str], *, instruction: str | None = None, **options: Unpack[OutputOptions]
    ) -> np.ndarray:
        """Embed documents; bare for most models, as they were trained (see `genembed info`)."""
        return self.encode(texts, instruction=self.settings.document_instruction if instruction is None else instruction, **options)

    def refine(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        halt: HaltingRule | None = None,
        steps: int | None = None,
        keep_trajectory: bool = False,
        truncate: Literal["right", "error"] = "right",
        show_progress_bar: bool = False,
    ) -> Refinement:
        """Refine texts and tell what happened to each of them.

        Args:
            texts: Texts. Without an instruction each is read bare, without a template.
            instruction: What the embedding is for; put before each text by the model's template.
            halt: When a text is finished; the model's own rule if None.
            steps: Short for `halt=FixedSteps(steps)`.
            keep_trajectory: Also return z_1 .. z_K.
            truncate: Cut texts that are too long from the right and flag them, or refuse them (`error`).
            show_progress_bar: Show a bar on stderr when the work takes more than a second.

        Raises:
            TypeError: If a text is not a string; the message has its row.
            InputError: If a text cannot be embedded, or is too long with `truncate="error"`; the message has its row.
            ConfigurationError: If the model cannot follow the halting rule.
            NonFiniteError: If an embedding came out non-finite or zero.
        """
        rule = self._rule(halt, steps)
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"texts is a single {type(texts).__name__}: refine takes a list, [text].")
        if truncate not in ("right", "error"):
            raise ConfigurationError(f"truncate={truncate!r}: choose 'right' or 'error'.")
        texts = list(texts)
        check_texts(texts)
        result = self._empty(len(texts), rule, keep_trajectory)
        longest = 0
        with tqdm(total=len(texts), unit="text", delay=1, disable=not show_progress_bar, leave=False) as bar:
            for start in range(0, len(texts), _WINDOW):
                tokenised = self._tokenise(texts[start : start + _WINDOW], instruction, start, truncate)
                span = slice(start, start + len(tokenised.ids))
                result.tokens[span], result.truncated[span] = tokenised.tokens, tokenised.truncated
                longest = max(longest, tokenised.longest)
                for done in self.engine.run(tokenised.ids, rule, keep_trajectory=keep_trajectory, first_row=start, shared=tokenised.shared):
                    result.vectors[done.index], result.steps[done.index] = done.vectors, done.steps
                    result.stability[done.index] = done.stability
                    if result.trajectory is not None:
                        result.trajectory[done.index] = done.trajectory
                    bar.update(len(done.index))
        warn_truncated(result, longest=longest, max_length=self.settings.max_length)
        return result

    def form(self, precision: Precision = "float32", truncate_dim: int | None = None) -> OutputForm:
        """Return the form vectors are given away in: a function that makes it of float32 vectors, and another that undoes it.

        Args:
            precision: `float32`, `float16`, `int8`, `uint8`, `binary` or `ubinary`, as in sentence-transformers. The ranges of eight bits
                come from the model's folder, never from the batch.
            truncate_dim: Keep so many leading dimensions, of those that the model was trained for (`ModelSettings.matryoshka_dims`), and
                make the vector unit length again.

        Raises:
            ConfigurationError: If the model cannot give this form; the message has the way out.
        """
        return form_of(
            precision, truncate_dim, hidden=self.get_embedding_dimension(), trained=self.settings.matryoshka_dims, ranges=self.ranges
        )

    def similarity(
        self, queries: Float[np.ndarray, "*queries hidden"], documents: Float[np.ndarray, "*documents hidden"]
    ) -> Float[np.ndarray, "queries documents"]:
        """Return the cosine of every query with every document; a single vector counts as one row."""
        return similarity(queries, documents)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to a folder that `genembed.load` reads, and that gives the same vectors; it is complete or absent.

        An adapter is written as an adapter that names its base, full weights in full, in the dtype they were loaded from.

        Args:
            folder: Created; must not exist, or be empty.

        Raises:
            ConfigurationError: If it cannot be made.
        """
        hub.save(self.source, self.settings, Path(folder))

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, commit_message: str = "Upload a genembed model"
    ) -> str:
        """Put the model on the Hugging Face hub, with a card made from its settings and the records in its folder.

        Args:
            repo_id: Owner and name, as "owner/name".
            private: Whether a new repository is seen by its owner alone.
            token: Of the hub; the one that `hf auth login` stored if None.
            commit_message: Of the upload.

        Returns:
            The address of the commit.

        Raises:
            ConfigurationError: If an adapter's base is a folder of this machine, which nobody else could load, or the hub refuses.
        """
        return hub.push(self.source, self.settings, repo_id, private=private, token=token, commit_message=commit_message)

    def first_prompt(self, text: str, *, instruction: str | None = None) -> str:
        """Return the exact string the model reads for a text, special tokens included."""
        return self.tokenizer.prompt(text, instruction)

    def _rule(self, halt: HaltingRule | None, steps: int | None) -> HaltingRule:
        if halt is not None and steps is not None:
            raise ConfigurationError(f"halt={halt} and steps={steps} both say when to stop; give one of them.")
        if halt is not None and (isinstance(halt, type) or not isinstance(halt, HaltingRule)):
            raise ConfigurationError(f"halt={halt!r}: expected a halting rule such as ConvergeStop(threshold=0.998) or FixedSteps(20).")
        rule = FixedSteps(steps) if steps is not None else halt if halt is not None else self.settings.halt
        self.backbone.check_halt(rule)
        return rule

    def _tokenise(self, texts: list[str], instruction: str | None, start: int, truncate: str) -> Tokenised:
        tokenised = self.tokenizer(texts, instruction, first_row=start)
        if truncate == "error" and tokenised.truncated.any():
            row = int(tokenised.truncated.argmax())
            raise InputError(
                f"row {start + row}: the text does not fit into {self.settings.max_length} tokens; shorten it, or allow truncate='right'.",
                row=start + row,
            )
        return tokenised

    def _empty(self, texts: int, rule: HaltingRule, keep_trajectory: bool) -> Refinement:
        hidden, steps = self.get_embedding_dimension(), rule.max_steps
        return Refinement(
            vectors=np.zeros((texts, hidden), dtype=np.float32),
            steps=np.zeros(texts, dtype=np.int64),
            stability=np.full((texts, max(steps - 1, 0)), np.nan, dtype=np.float32),
            trajectory=np.full((texts, steps, hidden), np.nan, dtype=np.float32) if keep_trajectory else None,
            tokens=np.zeros(texts, dtype=np.int64),
            truncated=np.zeros(texts, dtype=np.bool_),
        )


def warn_truncated(result: Refinement, *, longest: int, max_length: int) -> None:
    """Warn of texts that lost their end, at the line that called the package."""
    count = int(result.truncated.sum())
    if count:
        warnings.warn(
            f"{count} of {len(result.truncated)} texts were longer than {max_length} tokens (the longest has {longest}) "
            "and lost their end; see Refinement.truncated, or use truncate='error'.",
            GenembedWarning,
            stacklevel=_callers_level(),
        )


def load(
    path_or_id: str | Path,
    *,
    adapter: str | Path | None = None,
    preset: str | ModelSettings | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    offline: bool = False,
    parallel_passes: int | None = None,
    budget: Budget = DEFAULT_BUDGET,
) -> Embedder:
    """Load a model: a built-in one (`mini`), a folder, or a hub id; with or without a LoRA adapter.

    Args:
        path_or_id: Our own folder, a GIRCSE adapter folder as published, a merged LaSER-style folder, a plain causal LM,
            or the hub id of one of them.
        adapter: Adapter folder or hub id to put over `path_or_id`, which is then the base model.
        preset: How the model makes an embedding, where the folder does not say: `gircse`, `laser`, `causal-eos`,
            `bidirectional-avg`, `hard-tokens`, or a `ModelSettings`. It overrides the folder's own settings.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: `auto` (float32 on CPU, the checkpoint's own elsewhere), `float32`, `float64`, `bfloat16`, `float16`.
        offline: Never touch the network; hub ids must be in the local cache.
        parallel_passes: Refine all steps at once, in so many passes: several times faster for a text at a time, slower in large batches,
            and an approximation, of which `ModelSettings.parallel_passes` says more. None: what the settings say, usually 0.
        budget: How much is worked on at once; larger on an accelerator, smaller where memory is short.

    Raises:
        CheckpointError: If files are missing, pickled, or do not belong together.
        ConfigurationError: If the folder has no settings and no preset is given, or a value is unknown.
    """
    found = source.resolve(path_or_id, adapter=adapter, preset=preset, offline=offline)
    if parallel_passes is not None:
        found = replace(found, settings=replace(found.settings, parallel_passes=parallel_passes))
    return Embedder(checkpoint.load(found, device=device, dtype=dtype), budget=budget)


def _callers_level() -> int:
    """Return the stack level of the first frame outside the package, so that a warning points at the user's line."""
    package = str(Path(__file__).parent)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def similarity(
    queries: Float[np.ndarray, "*queries hidden"], documents: Float[np.ndarray, "*documents hidden"]
) -> Float[np.ndarray, "queries documents"]:
    """Return the cosine of every query with every document; a single vector counts as one row.

    Raises:
        ConfigurationError: If the vectors are codes: their products are no cosines.
    """
    codes = [one.dtype for one in (np.asarray(queries), np.asarray(documents)) if one.dtype.kind in "iu"]
    if codes:
        raise ConfigurationError(f"similarity of {codes[0]} codes: give vectors, form.restore(codes) of form = model.form(precision=...).")
    return np.asarray(_unit(queries) @ _unit(documents).T)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))
