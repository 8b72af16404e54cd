"""An encoder with a known answer, which costs nothing and breaks when told to. Processes of their own import it by name."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genembed.errors import InputError, NonFiniteError
from genembed.jobs.encoder import Encoded, Place

DIMENSIONS = 4


def vector_of(text: str) -> np.ndarray:
    """Return four numbers that are others for other texts."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:DIMENSIONS], np.uint8).astype(np.float32)


@dataclass(frozen=True)
class Stub:
    """Makes the encoder. Texts that begin with "refuse" and "explode" fail; one that begins with "die" kills the process."""

    name: str = "stub"
    log: Path | None = None
    """Gets a line for every text that is embedded."""
    mercy: Path | None = None
    """Where this file is, nobody dies any more; the first to die makes it."""
    seconds: float = 0.0
    """That a call takes."""

    def __call__(self, place: Place) -> StubEncoder:
        return StubEncoder(self)


class StubEncoder:
    def __init__(self, stub: Stub) -> None:
        self.identity: dict[str, Any] = {"model": stub.name}
        self._stub = stub

    def __call__(self, texts: Sequence[str]) -> Encoded:
        time.sleep(self._stub.seconds)
        for row, text in enumerate(texts):
            if text.startswith("refuse"):
                raise InputError(f"row {row}: no such text, please", row=row)
            if text.startswith("explode"):
                raise NonFiniteError(f"row {row}: the vector is not finite", row=row)
            if text.startswith("die"):
                self._die()
        if self._stub.log is not None:
            with self._stub.log.open("a") as file:
                file.write("".join(f"{text}\n" for text in texts))
        vectors = np.stack([vector_of(text) for text in texts]) if texts else np.zeros((0, DIMENSIONS), np.float32)
        steps = np.array([len(text) % 7 for text in texts], dtype=np.int32)
        truncated = np.array([len(text) > 50 for text in texts], dtype=np.bool_)
        return Encoded(vectors, steps, truncated, np.array([len(text) for text in texts], dtype=np.int64))

    def _die(self) -> None:
        mercy = self._stub.mercy
        if mercy is not None and mercy.exists():
            return
        if mercy is not None:
            mercy.touch()
        os.kill(os.getpid(), signal.SIGKILL)
