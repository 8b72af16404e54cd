"""Bytes on a disk that are all there, or not there at all; and are what they were meant to be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from genembed.errors import CheckpointError, JobError

Made = TypeVar("Made")

_TEMPORARY = ".tmp-"
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EIO: "the disk reports an input/output error",
    errno.EFBIG: "the file is larger than is allowed",
}


def commit(path: Path, content: bytes | memoryview) -> None:
    """Put a file in its place: under a temporary name, to the disk, read back, and renamed in one instant.

    Raises:
        JobError: If the disk refuses or loses a part of it; nothing is left behind then, and what stood there before stays.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        _write(temporary, memoryview(content))
        if _hash_of(temporary) != hashlib.sha256(content).hexdigest():
            raise JobError(f"{path}: what was written reads back otherwise; the disk or its driver loses data. {_KEPT}")
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise failed(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


_KEPT = "What is done is kept; go on with the same command."


def failed(path: Path, error: OSError) -> JobError:
    """Return the error of a file that could not be written."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return JobError(f"{path} could not be written: {reason}. {_KEPT}")


def sweep(path: Path) -> None:
    """Remove what killed workers have left of this file; nobody else may be writing it."""
    for leftover in path.parent.glob(f"{_TEMPORARY}{path.name}-*"):
        leftover.unlink(missing_ok=True)


def commit_json(path: Path, value: Mapping[str, Any]) -> None:
    """Put a JSON object in its place, as `commit` does."""
    commit(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that `commit_json` has written.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is damaged: it holds no JSON object.")
    return value


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **{"int": int, "str": str, "float": (int, float), "Mapping[str, Any]": dict},
    **{"int | None": (int, NoneType), "str | None": (str, NoneType), "tuple[Span, ...]": tuple},
}
"""Of plain fields, by their annotations."""


def made_of(kind: type[Made], value: Mapping[str, Any], path: Path) -> Made:
    """Make a record of plain fields out of what a file holds.

    Raises:
        CheckpointError: If a field is missing, unknown or of another type.
    """
    try:
        made = kind(**value)
    except TypeError as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from error
    for field in fields(made):  # type: ignore[arg-type]  # of a dataclass
        if not isinstance(own := getattr(made, field.name), _TYPES[str(field.type)]):
            raise CheckpointError(f"{path}: is damaged: {field.name} is {own!r:.80}.")
    return made


def _write(path: Path, content: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        while content:  # a disk that is nearly full may take a part
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        JobError: If it cannot be read.
    """
    try:
        return _hash_of(path)
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror or error}.") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
