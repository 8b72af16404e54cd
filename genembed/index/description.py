"""What an index folder says about itself: the file beside the table, and the hashes that tell models and texts apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genembed.embedder import Embedder
from genembed.errors import CheckpointError, ConfigurationError
from genembed.files import replacing
from genembed.index.passages import Passage
from genembed.settings import ModelSettings
from genembed.source import ADAPTER_CONFIG, BUILTIN, Source, sha256

DESCRIPTION_FILE = "genembed-index.json"
FORMAT_VERSION = 1
"""Version of the description file; a reader refuses another one."""

_SAMPLE_BYTES = 1 << 20
"""Bytes at either end of a weight file that its fingerprint reads: training changes every part of a file, and a base model
may be too large to be read whole for each search."""
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""What a tokenizer may be made of; those that are there are read whole."""


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
        description = Description(**value)
    except (OSError, ValueError, TypeError, AttributeError) as error:
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


def fingerprint(embedder: Embedder) -> str:
    """Hash what decides a model's vectors: samples of its weight files, its configuration, its tokenizer, and its settings.

    Settings that only bring the vectors closer, or are for queries alone, are left out.
    """
    digest = hashlib.sha256(_weights_fingerprint(embedder).encode())
    source = embedder.source
    files = [source.base / "config.json", *([] if source.adapter is None else [source.adapter / ADAPTER_CONFIG])]
    for path in [*files, *(source.tokenizer / name for name in _TOKENIZER_FILES)]:
        if path.is_file():
            digest.update(f"{path.name} {sha256(path)}".encode())
    return digest.hexdigest()


def is_fingerprint(known: str, embedder: Embedder) -> bool:
    """Whether a fingerprint is this model's; an index of before the other files were hashed has one of weights and settings alone."""
    return known == fingerprint(embedder) or known == _weights_fingerprint(embedder)


def _weights_fingerprint(embedder: Embedder) -> str:
    free = ("halt", "query_instruction", "parallel_passes")
    settings = {name: value for name, value in embedder.settings.to_json().items() if name not in free}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    source = embedder.source
    folders = [folder for folder in (source.base, source.adapter) if folder is not None]
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    for path in dict.fromkeys([*files, *([source.head] if source.head is not None else [])]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(size - _SAMPLE_BYTES, 0))
            digest.update(file.read())
    return digest.hexdigest()


def passages_hash(passages: Sequence[Passage]) -> str:
    """Hash references and texts, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps([passage.reference, passage.text]).encode())
    return digest.hexdigest()


def origin(source: Source) -> dict[str, Any]:
    """Return what has to be said to load the model again."""
    return {
        "model": absolute(source.name),
        "adapter": None if source.named_adapter is None else absolute(source.named_adapter),
        "preset": source.preset.to_json() if isinstance(source.preset, ModelSettings) else source.preset,
    }


def absolute(name: str) -> str:
    """Return the name of a model or adapter; a local folder's is absolute, as a search may start elsewhere."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name not in BUILTIN and folder.is_dir() else name


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
