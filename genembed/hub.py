"""A model's folder, complete or absent, and its way to the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from genembed.card import model_card
from genembed.errors import ConfigurationError
from genembed.files import replacing_folder
from genembed.settings import ModelSettings
from genembed.source import ADAPTER_CONFIG, MODEL_FILES, SETTINGS_FILE, Source, declared_base, is_hub_double, read_json, sha256

_WEIGHTS = "model.safetensors"
_RECORDS = ("history.csv",)
"""Of the training, beside those that are JSON."""


def save(source: Source, settings: ModelSettings, folder: Path) -> None:
    """Write a model as it was loaded: files are copied, so that its vectors stay the same to the last bit.

    Args:
        source: Where the model came from.
        settings: How it makes an embedding now.
        folder: Created; must not exist, or be empty.

    Raises:
        ConfigurationError: If the folder holds something, or cannot be made.
    """
    check_target(folder)
    with replacing_folder(folder) as staged:
        _write(source, settings, staged)


def push(
    source: Source,
    settings: ModelSettings,
    repo_id: str,
    *,
    private: bool,
    token: str | None,
    commit_message: str,
) -> str:
    """Write a model with its card to a temporary folder, and upload it.

    Returns:
        The address of the commit.

    Raises:
        ConfigurationError: If nobody else could load the model, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with tempfile.TemporaryDirectory(prefix="genembed-") as parent:
        folder = Path(parent) / "model"
        save(source, settings, folder)
        _check_base_is_public(folder)
        (folder / "README.md").write_text(model_card(folder, repo_id, licence=_licence(source)), encoding="utf-8")
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ConfigurationError(
                f"{repo_id}: the hub did not take the model; check the name, the network, and that you are logged in (hf auth login). "
                f"({error})"
            ) from error


def check_target(folder: Path) -> None:
    """Refuse a folder that holds something: it would be lost.

    Raises:
        ConfigurationError: If there is anything in it, or it is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder}: is there already and is not replaced; choose another place, or delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)


def write_settings(settings: ModelSettings, folder: Path, **further: Any) -> None:
    """Write the settings file of a model folder."""
    text = json.dumps({**settings.to_json(), **further}, indent=2) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _write(source: Source, settings: ModelSettings, folder: Path) -> None:
    own = source.base if source.adapter is None else source.adapter
    names = {path.name: path for pattern in (*MODEL_FILES, *_RECORDS) for path in own.glob(pattern) if not is_hub_double(path.name)}
    for path in (*names.values(), source.head, source.ranges):
        if path is not None:
            shutil.copyfile(path, folder / path.name)
    if source.adapter is None:
        write_settings(settings, folder)
        return
    config = read_json(folder / ADAPTER_CONFIG)
    if source.named_adapter is not None:
        local = Path(source.name).expanduser()
        config["base_model_name_or_path"] = str(local.resolve()) if local.is_dir() else source.name
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = source.base / _WEIGHTS
    base = declared_base(source.adapter) or ({"sha256": sha256(weights)} if weights.is_file() else {})
    write_settings(settings, folder, base=base)


def _check_base_is_public(folder: Path) -> None:
    """Refuse an adapter over a folder of this machine."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    base = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
    if Path(base).expanduser().is_dir() or base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise ConfigurationError(
            f"the adapter's base model is {base!r}, which nobody else could load: name the base by its hub id, "
            "load('owner/base', adapter=...), or upload merged weights (genembed convert MODEL OUT --to merged)."
        )


def _licence(source: Source) -> str | None:
    """Return the licence that the card in the model's own folder names; none is made up."""
    card = (source.adapter or source.base) / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return None
    front = lines[1 : lines.index("---", 1)]
    return next((line.partition(":")[2].strip() for line in front if line.startswith("license:")), None)
