"""A job whose encoder costs next to nothing: what is left is the job. Run as a process of its own, it is what gets killed."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genembed.jobs.encoder import Encoded, Place
from genembed.jobs.folder import Description, JobFolder
from genembed.jobs.run import Corpus, prepare, run_local

DIMENSIONS = 8


@dataclass(frozen=True)
class Stub:
    """Makes a vector out of a text's checksum; may take its time, and write down when it did."""

    seconds: tuple[float, ...] = ()
    """That the shard of each number takes; none: as fast as it can."""
    log: Any = None
    """List that gets the first row of a call, its beginning and its end, in seconds."""

    def __call__(self, place: Place) -> _Encoder:
        """Return the encoder of one worker."""
        return _Encoder(self)


class _Encoder:
    def __init__(self, stub: Stub) -> None:
        self.identity: Mapping[str, Any] = {"model": "checksum"}
        self._stub = stub

    def __call__(self, texts: Sequence[str]) -> Encoded:
        begin = time.perf_counter()
        if self._stub.seconds and texts:
            time.sleep(self._stub.seconds[int(texts[0].split()[0])])
        sums = np.array([zlib.crc32(text.encode()) for text in texts], dtype=np.uint32)
        vectors = (sums[:, None] >> np.arange(DIMENSIONS, dtype=np.uint32)).astype(np.float32)
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        if self._stub.log is not None and texts:
            self._stub.log.append((int(texts[0].split()[0]), begin, time.perf_counter()))
        return Encoded(vectors, (lengths % 20).astype(np.int32), lengths > 60, lengths)


def start(root: Path, rows: Path, shard_rows: int) -> JobFolder:
    """Prepare a job over a file of rows."""
    folder = JobFolder(root)
    description = Description(identity=Stub()(Place()).identity, origin={"model": "checksum"}, max_rejects=10**6, output="parquet")
    prepare(folder, Corpus(inputs=[str(rows)], id_column="id", shard_rows=shard_rows), description)
    return folder


if __name__ == "__main__":
    run_local(start(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])), Stub(), workers=int(sys.argv[4]))
