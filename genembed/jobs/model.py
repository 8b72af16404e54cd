"""The encoder of a real job: an embedding model, loaded inside the worker."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from genembed.errors import GenembedWarning
from genembed.jobs.encoder import Encoded, Place

if TYPE_CHECKING:
    from genembed.embedder import Embedder
    from genembed.halting import ConvergeStop, FixedSteps
    from genembed.precision import Precision
    from genembed.settings import ModelSettings
    from genembed.source import Source


@dataclass(frozen=True, kw_only=True)
class ModelFactory:
    """Which model embeds the corpus, and how. Loads it in a worker; knows without loading it what its vectors depend on."""

    model: str
    adapter: str | None = None
    preset: str | None = None
    device: str = "auto"
    weights: str = "auto"
    """Number type of the weights, as `genembed.load` takes it."""
    offline: bool = False
    instruction: str | None = None
    """What the embedding is for; None: the model's own one for documents."""
    halt: FixedSteps | ConvergeStop | None = None
    """None: the model's own."""
    truncate: Literal["right", "error"] = "right"
    dtype: Precision = "float32"
    """Of the vectors that are written."""
    dims: int | None = None
    """Dimensions that are kept; None: all."""

    def __call__(self, place: Place) -> ModelEncoder:
        """Load the model. Workers of one machine share its processors, and take its GPUs in turn."""
        import torch

        from genembed.embedder import load

        device = self.device
        if device in ("auto", "cuda") and torch.cuda.is_available() and place.workers > 1:
            device = f"cuda:{place.worker % torch.cuda.device_count()}"
        elif place.workers > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.workers))
        embedder = load(self.model, adapter=self.adapter, preset=self.preset, device=device, dtype=self.weights, offline=self.offline)
        return ModelEncoder(embedder, self)

    def identity(self) -> dict[str, Any]:
        """Return everything that decides a vector, without loading the weights.

        Raises:
            CheckpointError: If the model is not there, or damaged.
            ConfigurationError: If it cannot do what is asked of it.
        """
        from genembed import source

        found = source.resolve(self.model, adapter=self.adapter, preset=self.preset, offline=self.offline)
        return self.identity_of(_Found(found, found.settings))

    def identity_of(self, model: _Found | Embedder) -> dict[str, Any]:
        """Return everything that decides a vector of this model."""
        from genembed.fingerprint import fingerprint
        from genembed.source import sha256

        settings = model.settings
        if self.halt is not None:
            settings.check_halt(self.halt)
        return {
            "model": fingerprint(model),
            "instruction": settings.document_instruction if self.instruction is None else self.instruction,
            "halt": repr(settings.halt if self.halt is None else self.halt),
            "truncate": self.truncate,
            "weights": self.weights,
            "dtype": self.dtype,
            "dims": self.dims,
            "ranges": sha256(model.source.ranges) if self.dtype == "int8" and model.source.ranges is not None else None,
        }

    def origin(self) -> dict[str, Any]:
        """Return the names by which the model is loaded again."""
        from genembed import source
        from genembed.fingerprint import origin
        from genembed.halting import rule_to_json

        found = source.resolve(self.model, adapter=self.adapter, preset=self.preset, offline=self.offline)
        return {**origin(found), "halt": rule_to_json(found.settings.halt if self.halt is None else self.halt)}


@dataclass(frozen=True)
class _Found:
    """A model whose files are known, and not loaded."""

    source: Source
    settings: ModelSettings


class ModelEncoder:
    """An embedder, as a worker sees it."""

    def __init__(self, embedder: Embedder, factory: ModelFactory) -> None:
        self._embedder, self._factory = embedder, factory
        self._form = embedder.form(factory.dtype, factory.dims)
        self.identity: Mapping[str, Any] = factory.identity_of(embedder)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Embed texts; see `Encoder`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GenembedWarning)  # each row says for itself that it was cut
            done = self._embedder.refine(
                texts, instruction=self.identity["instruction"], halt=self._factory.halt, truncate=self._factory.truncate
            )
        return Encoded(self._form(done.vectors), done.steps.astype(np.int32), done.truncated, done.tokens)
