"""Model folders: what may be in one, how it is checked, and how it becomes a backbone."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from genembed.backbone import Backbone, SoftTokenHead
from genembed.errors import CheckpointError, ConfigurationError
from genembed.settings import ModelSettings, preset_settings
from genembed.tokens import PromptTokenizer
from genembed.verify import verify

SETTINGS_FILE = "genembed.json"
HEAD_FILE = "soft_token_head.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BUILTIN = ("mini",)
"""Names of the models that come with the package."""

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "camembert")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, resolved to local folders."""

    name: str
    settings: ModelSettings
    base: Path
    adapter: Path | None
    head: Path | None
    tokenizer: Path


@dataclass(frozen=True)
class Loaded:
    """A model ready to be run."""

    source: Source
    backbone: Backbone
    tokenizer: PromptTokenizer


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
    head = next((place / HEAD_FILE for place in (extra, folder) if place is not None and (place / HEAD_FILE).is_file()), None)
    tokenizer = extra if extra is not None and (extra / "tokenizer.json").is_file() else folder
    return Source(str(path_or_id), settings, folder, extra, head, tokenizer)


def load(source: Source, *, device: str, dtype: str | torch.dtype) -> Loaded:
    """Load weights and tokenizer of a resolved model."""
    target = _device(device)
    model = _load_model(source, _dtype(dtype, target))
    stepper: PreTrainedModel | None = None
    if source.adapter is not None:
        if source.settings.adapter_positions == "generated":
            stepper = _merge_adapter(twin(model), source.adapter)
        else:
            model = _merge_adapter(model, source.adapter)
    head = _load_head(source, model)
    parts: list[nn.Module] = [part for part in (model, stepper, head) if part is not None]
    for part in parts:
        part.to(target).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=False, local_files_only=True)
    backbone = Backbone(model, source.settings, head=head, stepper=stepper)
    verify(backbone)
    return Loaded(source, backbone, PromptTokenizer(tokenizer, source.settings))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(path_or_id: str | Path, *, offline: bool) -> Path:
    """Turn a name, a path or a hub id into a local folder."""
    if str(path_or_id) in BUILTIN:
        return Path(str(resources.files("genembed") / "builtin" / str(path_or_id)))
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or str(path_or_id).count("/") != 1 or str(path_or_id).startswith("."):
        raise CheckpointError(
            f"{path_or_id!r} is neither a folder, nor a hub id (owner/name), nor a built-in model ({', '.join(BUILTIN)})."
        )
    return _download(str(path_or_id), offline=offline)


def _download(repo_id: str, *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES, local_files_only=offline))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        way_out = (
            "load it once without offline=True, or pass a local folder"
            if offline
            else "check the name and the network, or pass a local folder"
        )
        raise CheckpointError(
            f"{repo_id}: not found in the local cache{'' if offline else ' or on the hub'}; {way_out}. ({error})"
        ) from error


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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _base_of(adapter: Path, *, offline: bool) -> Path:
    """Find the base model an adapter folder names."""
    named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = _packaged_base(_declared_base(adapter))
    if base is None:
        if not named:
            raise CheckpointError(
                f"{adapter / ADAPTER_CONFIG}: no base_model_name_or_path; name the base yourself: load(base, adapter=...)."
            )
        try:
            base = _folder(named, offline=offline)
        except CheckpointError as error:
            raise CheckpointError(
                f"{adapter}: its base model {named!r} cannot be found; name the base: load(base, adapter={str(adapter)!r}). ({error})"
            ) from error
    return base


def _declared_base(adapter: Path) -> dict[str, Any]:
    """Return what an adapter's settings file says of its base model; nothing for published adapters."""
    own = read_json(adapter / SETTINGS_FILE).get("base", {}) if (adapter / SETTINGS_FILE).is_file() else {}
    if not isinstance(own, dict):
        raise CheckpointError(f"{adapter / SETTINGS_FILE}: base must be an object with package, folder and sha256.")
    return own


def _check_base(adapter: Path, base: Path) -> None:
    """Refuse a base model with other weights than the adapter was trained over, where the adapter says which."""
    expected = _declared_base(adapter).get("sha256")
    weights = base / "model.safetensors"
    if expected is not None and (found := sha256(weights) if weights.is_file() else "absent") != expected:
        raise CheckpointError(
            f"{weights}: sha256 is {found}, but the adapter {adapter} was trained over {expected}; reinstall the base model."
        )


def _packaged_base(own: dict[str, Any]) -> Path | None:
    """Return the folder of a base model that is an installed Python package, if there is one."""
    package = own.get("package")
    spec = util.find_spec(package) if isinstance(package, str) and package.isidentifier() else None
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent.resolve()
    folder = (root / str(own.get("folder", "."))).resolve()
    if not folder.is_relative_to(root):
        raise CheckpointError(f"base folder {own.get('folder')!r} lies outside the package {package}.")
    return folder if folder.is_dir() else None


def _check_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json, so this is not a model folder.")
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: only pickled weights ({', '.join(pickled)}), which can run code when read; convert them to safetensors first."
        )
    raise CheckpointError(f"{folder}: no weights (model.safetensors is missing).")


def _load_model(source: Source, dtype: torch.dtype | str) -> PreTrainedModel:
    folder = source.base
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: its config.json is not one this Transformers version knows: {error}") from error
    if config.model_type in _ENCODERS:
        _check_encoder(source)
        config.is_decoder = True
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the weights do not load: {error}") from error
    model: PreTrainedModel = loaded[0]
    _check_report(loaded[1], model, source)
    return model


def _check_encoder(source: Source) -> None:
    if source.settings.attention == "causal":
        raise ConfigurationError(f"{source.base}: an encoder has to be read with attention='prefix' (or 'bidirectional'), not 'causal'.")


def _check_report(report: dict[str, Any], model: PreTrainedModel, source: Source) -> None:
    """Refuse a checkpoint that leaves weights at random, unless they are a head that is replaced or never used."""
    head_unused = source.head is not None or source.settings.halt.max_steps == 0
    body = f"{model.base_model_prefix}."
    missing = {name for name in report["missing_keys"] if name.startswith(body) or not head_unused}
    if missing:
        raise CheckpointError(
            f"{source.base}: weights are missing and would be random: {', '.join(sorted(missing)[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. An encoder needs a trained {HEAD_FILE} to generate."
        )
    if report["mismatched_keys"]:
        raise CheckpointError(
            f"{source.base}: weights have other shapes than config.json says: {sorted(map(str, report['mismatched_keys']))[:3]}"
        )


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, sharing its embedding table."""
    table = model.get_input_embeddings().weight
    return copy.deepcopy(model, {id(table): table})


def _merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Add a LoRA adapter to the weights.

    Raises:
        CheckpointError: If the adapter does not fit the model.
    """
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        pickled = [path.name for path in adapter.glob("adapter_model.bin")]
        raise CheckpointError(f"{adapter}: no {ADAPTER_WEIGHTS}{'; ' + pickled[0] + ' is pickled and is not read' if pickled else ''}.")
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    try:
        with _quiet(), warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            peft_model = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
            stored = set(load_file(adapter / ADAPTER_WEIGHTS))
            # Not `auto`, PEFT's default: that asks the hub for the base model's config.json.
            expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{adapter}: does not fit the base model {model.config.name_or_path!r}; was it trained over another one? ({error})"
        ) from error
    if stored != expected:
        odd = sorted(stored ^ expected)
        raise CheckpointError(
            f"{adapter}: does not fit the base model {model.config.name_or_path!r}: {len(odd)} weights have no counterpart, first {odd[0]}."
        )
    with _quiet():
        return peft_model.merge_and_unload()  # type: ignore[no-any-return]


def _load_head(source: Source, model: PreTrainedModel) -> SoftTokenHead | None:
    if source.head is None:
        return None
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    head = SoftTokenHead(table.shape[1], table.shape[0])
    try:
        head.load_state_dict(load_file(source.head))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{source.head}: does not fit a model with {table.shape[0]} tokens of {table.shape[1]} dimensions: {error}"
        ) from error
    return head.to(table.dtype)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"device={device!r}: {error}") from error


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """Return the dtype to load: the checkpoint's own on an accelerator, float32 on CPU, where half precision is rarely fast."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConfigurationError(f"dtype={dtype!r}: choose auto, float32, float64, bfloat16 or float16.")
    return named


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Transformers' loading tables and bars off the terminal; what matters in them is checked and raised by us."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
