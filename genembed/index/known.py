"""Vectors that were made elsewhere, in the place of the model that made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from genembed.embedder import Refinement
from genembed.errors import ConfigurationError
from genembed.halting import HaltingRule
from genembed.precision import OutputForm, Precision, form_of
from genembed.settings import ModelSettings
from genembed.source import Source, ranges_of


@dataclass(frozen=True)
class KnownVectors:
    """Answers as the model would, for the texts that it has embedded."""

    source: Source
    """Of the model."""
    texts: Sequence[str]
    vectors: Float[np.ndarray, "texts hidden"]
    """float32 unit vectors."""
    steps: Int[np.ndarray, "texts"]
    truncated: Bool[np.ndarray, "texts"]

    @property
    def settings(self) -> ModelSettings:
        """Of the model."""
        return self.source.settings

    def get_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return int(self.vectors.shape[1])

    def form(self, precision: Precision = "float32", truncate_dim: int | None = None) -> OutputForm:
        """Return the form vectors are kept in, as `Embedder.form` does."""
        trained = self.settings.matryoshka_dims
        return form_of(precision, truncate_dim, hidden=self.get_embedding_dimension(), trained=trained, ranges=ranges_of(self.source))

    def refine(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None,
        halt: HaltingRule | None,
        truncate: Literal["right", "error"],
        show_progress_bar: bool,
    ) -> Refinement:
        """Look texts up. How they were refined is decided long since: the arguments say for the index what it was.

        Raises:
            ConfigurationError: If a text is not among them.
        """
        known = {_key(text): row for row, text in enumerate(self.texts)}
        rows = np.asarray([known.get(_key(text), -1) for text in texts], dtype=np.int64)
        if (rows < 0).any():
            missing = texts[int((rows < 0).argmax())]
            raise ConfigurationError(f"{missing!r:.60}: this text was not embedded by the job; index it with its model instead.")
        nothing = np.zeros((len(rows), 0), dtype=np.float32)
        tokens = np.zeros(len(rows), dtype=np.int64)
        return Refinement(self.vectors[rows], self.steps[rows], nothing, None, tokens, self.truncated[rows])


def _key(text: str) -> bytes:
    return sha256(text.encode()).digest()
