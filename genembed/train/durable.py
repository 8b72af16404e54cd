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


_ASIDE = ".old-"
"""Begins the name of a folder that another one is about to replace."""


def publish(staged: Path, final: Path) -> None:
    """Make a written folder durable and give it its name; a folder of that name gives way.

    The earlier folder is moved aside before, and deleted after: at every moment one whole folder lies under `final` or under the
    name from which `recover` brings it back.

    Args:
        staged: The written folder, on the same file system.
        final: The name it gets.
    """
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    recover(final)
    aside = _aside(final)
    if final.exists():
        final.rename(aside)
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover(final: Path) -> None:
    """Bring back the folder that a killed `publish` had moved aside, or delete it if its successor is there."""
    aside = _aside(final)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(final)


def recover_all(folder: Path) -> None:
    """Bring back every folder in this one that a killed `publish` had moved aside."""
    for aside in folder.glob(f"{_ASIDE}*"):
        recover(folder / aside.name.removeprefix(_ASIDE))


def _aside(final: Path) -> Path:
    return final.with_name(f"{_ASIDE}{final.name}")


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
