"""Files that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from genembed.errors import TrainingError
from genembed.files import replacing

_ROOM = 1 << 20
"""Fewer free bytes than this count as a full disk: PyTorch's own error does not say why a file ended early."""


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    replace_parts(path, [text])


def replace_parts(path: Path, parts: Iterable[str]) -> None:
    """Write a text file in one step out of parts that are made while it is written."""
    with replacing(path) as file:
        for part in parts:
            file.write(part.encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path, *, leftover: Path | None = None) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is written into an error that says what is lost, and what is not.

    Args:
        path: What is written.
        leftover: Folder to remove when it fails.

    Raises:
        TrainingError: If the disk is full or refuses.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = _is_full(error, path)
        if not full and not isinstance(error, OSError):
            raise
        if leftover is not None:
            shutil.rmtree(leftover, ignore_errors=True)
        reason = "the disk is full" if full else str(error)
        raise TrainingError(
            f"{path} could not be written: {reason}. Earlier checkpoints are untouched; make room and start again with --resume."
        ) from error


def _is_full(error: BaseException, path: Path) -> bool:
    """Whether there is no room: writers of tensors raise errors of their own for that."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if any(sign in str(error) for sign in ("os error 28", "os error 27", "No space left", "unexpected pos")):
        return True
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(place).free < _ROOM
