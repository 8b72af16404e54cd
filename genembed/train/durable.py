"""Folders that a killed process or a power cut leaves whole or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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


def _aside(final: Path) -> Path:
    return final.with_name(f".old-{final.name}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
