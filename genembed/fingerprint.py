"""What makes two models the same: a hash of everything that decides their vectors, and how to load one again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from genembed.settings import ModelSettings
from genembed.source import ADAPTER_CONFIG, BUILTIN, Source, sha256


@runtime_checkable
class Model(Protocol):
    """What is hashed of a model: an `Embedder`, or a model that is found and not loaded."""

    @property
    def source(self) -> Source:
        """Where its files are."""

    @property
    def settings(self) -> ModelSettings:
        """How it makes an embedding."""


_SAMPLE_BYTES = 1 << 20
"""Bytes at either end of a weight file that its fingerprint reads: training changes every part of a file, and a base model
may be too large to be read whole for each search."""
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""What a tokenizer may be made of; those that are there are read whole."""


def fingerprint(model: Model) -> str:
    """Hash what decides a model's vectors: samples of its weight files, its configuration, its tokenizer, and its settings.

    Settings that only bring the vectors closer, or are for queries alone, are left out.
    """
    digest = hashlib.sha256(_weights_fingerprint(model).encode())
    source = model.source
    files = [source.base / "config.json", *([] if source.adapter is None else [source.adapter / ADAPTER_CONFIG])]
    for path in [*files, *(source.tokenizer / name for name in _TOKENIZER_FILES)]:
        if path.is_file():
            digest.update(f"{path.name} {sha256(path)}".encode())
    return digest.hexdigest()


def is_fingerprint(known: str, model: Model) -> bool:
    """Whether a fingerprint is this model's; an index of before the other files were hashed has one of weights and settings alone."""
    return known == fingerprint(model) or known == _weights_fingerprint(model)


def _weights_fingerprint(model: Model) -> str:
    free = ("halt", "query_instruction", "parallel_passes")
    settings = {name: value for name, value in model.settings.to_json().items() if name not in free}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    source = model.source
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
