"""What an index folder says about itself: the file beside the table, and the hashes that tell models and texts apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genembed.errors import CheckpointError, ConfigurationError
from genembed.files import replacing
from genembed.index.passages import Passage
from genembed.index.stored import Stored
from genembed.settings import ModelSettings

DESCRIPTION_FILE = "genembed-index.json"
FORMAT_VERSION = 1
"""Version of the description file; a reader refuses another one."""


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """How well the approximate index of the vectors finds what an exact search finds."""

    kind: str
    """LanceDB's name of the index."""
    recall: float
    """Share of the exact neighbours that the approximate search finds, mean over the queries."""
    neighbours: int
    """Neighbours that were asked for, the k of recall@k."""
    queries: int
    """How many queries were tried; each is the mean of two vectors of the index."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the index folder says about itself."""

    model: str
    """Name, folder or hub id of the model."""
    dimensions: int
    halt: str
    """Halting rule of the texts; queries may use another."""
    instruction: str | None
    """Instruction the texts were embedded under."""
    fingerprint: str
    """Hash of the model's settings and files, see `fingerprint`."""
    passages: str
    """Hash of references and texts, see `passages_hash`."""
    rows: int
    steps: float
    """Refinement steps done for a text, mean; 0 if there is no text."""
    seconds: float
    """Time the embedding took, of the first build and of all updates together."""
    adapter: str | None = None
    """Folder or hub id of the adapter that was named beside the model, if any."""
    preset: str | dict[str, Any] | None = None
    """What was given instead of the model's own settings: a preset's name, or settings as in a settings file."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Columns that were kept beside the texts, and their types."""
    approximation: Approximation | None = None
    """The approximate index of the vectors; None where every vector is compared."""
    stored: Stored = field(default_factory=Stored)
    """How the vectors are kept."""
    version: int | None = None
    """Version of the table that this describes; what a killed update wrote is a later one. None in an index that was never one of
    several."""

    @property
    def model_settings(self) -> str | ModelSettings | None:
        """The preset as `genembed.load` takes it; None where the model's own settings hold."""
        return ModelSettings.from_json(self.preset, source=DESCRIPTION_FILE) if isinstance(self.preset, dict) else self.preset


def read_description(folder: Path) -> Description:
    """Read the description of an index.

    Raises:
        ConfigurationError: If there is none, or a newer genembed wrote it.
        CheckpointError: If it cannot be read.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise ConfigurationError(f"{folder}: there is no index (no {DESCRIPTION_FILE}); make one with: genembed index PATH -o {folder}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value.pop("format_version", None)
        if value.get("approximation") is not None:
            value["approximation"] = Approximation(**value["approximation"])
        value["stored"] = Stored.from_json(value.get("stored", {}))
        description = Description(**value)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(folder, error) from error
    if version != FORMAT_VERSION:
        raise ConfigurationError(f"{path}: format_version {version!r} is not {FORMAT_VERSION}; build the index again with --overwrite.")
    return description


def write_description(folder: Path, description: Description) -> None:
    """Put the description in the place of the one that is there, in one instant."""
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(description)}, indent=2, ensure_ascii=False)
    with replacing(folder / DESCRIPTION_FILE) as file:
        file.write(text.encode() + b"\n")


def damaged(folder: Path, reason: object) -> CheckpointError:
    """Return the error of a folder whose files do not belong together."""
    return CheckpointError(f"{folder}: the index is damaged; build it again with --overwrite. ({reason})")


def passages_hash(passages: Sequence[Passage]) -> str:
    """Hash references and texts, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps([passage.reference, passage.text]).encode())
    return digest.hexdigest()


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place where an index would destroy something.

    Raises:
        ConfigurationError: If there is a file, a folder of something else, or an index that is not to be overwritten.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: is a file; an index is a folder: choose another name.")
    if (folder / DESCRIPTION_FILE).is_file():
        if not overwrite:
            raise ConfigurationError(
                f"{folder}: there is an index already; replace it with --overwrite, add to it with --update, or choose another folder."
            )
    elif any(folder.iterdir()):
        raise ConfigurationError(f"{folder}: is a folder with other things in it, which would be lost; choose another one.")
