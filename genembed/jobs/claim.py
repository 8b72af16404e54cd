"""One worker for each shard, on all machines that share the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genembed.errors import missing_extra


@contextmanager
def claimed(lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock while the block runs, if nobody else holds it; say whether it is held.

    A worker that dies lets go of it at that instant. Where a network file system does not keep locks, two workers may make the same
    shard: both write the same bytes, and the renaming leaves one copy.

    Args:
        lock: File of the lock.
        wait: Wait for whoever holds it.
    """
    try:
        from filelock import FileLock, Timeout
    except ModuleNotFoundError as error:
        raise missing_extra("jobs", "filelock") from error
    own = FileLock(lock, timeout=-1 if wait else 0)
    try:
        own.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        own.release()
