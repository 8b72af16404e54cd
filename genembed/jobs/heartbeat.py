"""What a worker tells of itself while it works: one small file, which anybody may read."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from genembed.errors import CheckpointError
from genembed.jobs.encoder import Encoded
from genembed.jobs.folder import JobFolder
from genembed.jobs.storage import made_of, read_object

_EVERY_SECONDS = 1.0
_SILENT_SECONDS = 600.0
"""A worker on another machine that says nothing for so long counts as gone."""


@dataclass
class Heartbeat:
    """The state of one worker."""

    host: str
    process: int
    worker: int
    """Of those on this machine."""
    started: float
    """Seconds since the epoch."""
    updated: float
    busy_seconds: float = 0.0
    """Spent on shards, so far."""
    rows: int = 0
    """Embedded or rejected by this worker."""
    tokens: int = 0
    steps: int = 0
    shard: int | None = None
    """In work; None between two."""
    shard_rows: int = 0
    """Rows of that shard that are done, and not yet safe."""
    shard_rejects: int = 0

    @property
    def alive(self) -> bool:
        """Whether the worker is still there, as far as can be told from here."""
        if self.host == socket.gethostname():
            return Path(f"/proc/{self.process}").exists() if Path("/proc").is_dir() else _exists(self.process)
        return time.time() - self.updated < _SILENT_SECONDS


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Reporter:
    """Keeps a worker's heartbeat on the disk, at most once a second; removed when the worker ends."""

    def __init__(self, folder: JobFolder, worker: int) -> None:
        now = time.time()
        self.state = Heartbeat(host=socket.gethostname(), process=os.getpid(), worker=worker, started=now, updated=now)
        self._path = folder.workers / f"{self.state.host}-{self.state.process}-{uuid.uuid4().hex[:8]}.json"
        self._begun = 0.0
        self._said = 0.0

    def begin(self, shard: int) -> None:
        """Tell that a shard is begun."""
        self._begun = time.perf_counter()
        self.state.shard, self.state.shard_rows, self.state.shard_rejects = shard, 0, 0
        self._say()

    def advance(self, encoded: Encoded, rejects: int) -> None:
        """Tell of rows that are done."""
        state, rows = self.state, len(encoded.steps) + rejects
        state.rows, state.shard_rows = state.rows + rows, state.shard_rows + rows
        state.shard_rejects += rejects
        state.tokens, state.steps = state.tokens + int(encoded.tokens.sum()), state.steps + int(encoded.steps.sum())
        now = time.perf_counter()
        state.busy_seconds, self._begun = state.busy_seconds + now - self._begun, now
        self._say()

    def end(self) -> None:
        """Tell that the shard is safe."""
        now = time.perf_counter()
        self.state.busy_seconds += now - self._begun
        self.state.shard, self.state.shard_rows, self.state.shard_rejects = None, 0, 0
        self._say(now=True)

    def close(self) -> None:
        """Take the heartbeat away."""
        self._path.unlink(missing_ok=True)

    def _say(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._said < _EVERY_SECONDS:
            return
        self._said, self.state.updated = time.monotonic(), time.time()
        temporary = self._path.with_suffix(".tmp")
        with suppress(FileNotFoundError):  # somebody else has finished the job and cleared away
            temporary.write_text(json.dumps(asdict(self.state)), encoding="utf-8")
            temporary.replace(self._path)


def heartbeats(folder: JobFolder) -> Iterator[Heartbeat]:
    """Yield the workers that are still there."""
    for path in sorted(folder.workers.glob("*.json")):
        try:
            state = made_of(Heartbeat, read_object(path), path)
        except CheckpointError:
            continue  # it ended just now, or an older worker left something else: a sign of life is no record
        if state.alive:
            yield state
