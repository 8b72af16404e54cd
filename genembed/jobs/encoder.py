"""Texts to numbers, as a worker sees it; and how one bad text is kept from taking the others with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from genembed.errors import TextError
from genembed.jobs.rows import Reject, Row

CHUNK = 2_048
"""Rows between two signs of life, and at stake when one of them fails."""


@dataclass(frozen=True)
class Encoded:
    """What became of texts, in their order."""

    vectors: np.ndarray
    """One row a text, of the job's number type."""
    steps: np.ndarray
    """Refinement steps, int32."""
    truncated: np.ndarray
    """Whether a text lost its end, bool."""
    tokens: np.ndarray
    """Prompt tokens read, int64."""


@runtime_checkable
class Encoder(Protocol):
    """What turns texts into vectors: the same ones for the same texts in the same order."""

    identity: Mapping[str, Any]
    """Everything that decides a vector."""

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Embed texts.

        Raises:
            TextError: If one of them cannot be; `row` says which.
        """


@dataclass(frozen=True)
class Place:
    """Which worker of how many on this machine; who shares processors and devices has to know."""

    worker: int = 0
    workers: int = 1


EncoderFactory = Callable[[Place], Encoder]
"""Makes the encoder inside a worker; has to be picklable."""


def encode_rows(
    encoder: Encoder, rows: Sequence[Row], *, advance: Callable[[Encoded, int], None]
) -> tuple[Encoded | None, list[int], list[Reject]]:
    """Embed rows, the longest first; those that fail are told apart, and the others go on.

    Args:
        encoder: Embeds a list of texts.
        rows: Of a shard.
        advance: Called with what was embedded, and how many rows were rejected, some thousand rows at a time.

    Returns:
        What became of the rows, their positions in `rows` (rising), and the rejected ones. None where no row is left.
    """
    order = sorted(range(len(rows)), key=lambda position: len(rows[position].text), reverse=True)
    done: list[tuple[list[int], Encoded]] = []
    rejects: list[Reject] = []
    for start in range(0, len(order), CHUNK):
        chunk, before = order[start : start + CHUNK], len(rejects)
        encoded = _encode_chunk(encoder, rows, chunk, rejects)
        if encoded is not None:
            done.append((chunk, encoded))
            advance(encoded, len(rejects) - before)
    if not done:
        return None, [], rejects
    positions = np.concatenate([np.asarray(chunk) for chunk, _ in done])
    back = np.argsort(positions)
    joined = Encoded(
        *(np.concatenate([getattr(part, name) for _, part in done])[back] for name in ("vectors", "steps", "truncated", "tokens"))
    )
    return joined, positions[back].tolist(), rejects


def _encode_chunk(encoder: Encoder, rows: Sequence[Row], chunk: list[int], rejects: list[Reject]) -> Encoded | None:
    """Embed a chunk; a row that fails leaves the list, and the rest is tried again."""
    while chunk:
        try:
            return encoder([rows[position].text for position in chunk])
        except TextError as error:
            if error.row is None:
                raise
            row = rows[chunk.pop(error.row)]
            reason = str(error).removeprefix(f"row {error.row}: ")
            rejects.append(Reject(row.number, row.id, row.place, reason))
    return None
