"""From a model folder to a backbone: weights, adapter, head and tokenizer, each checked against the others."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from genembed.backbone import Backbone, SoftTokenHead
from genembed.errors import CheckpointError, ConfigurationError, NonFiniteError
from genembed.source import ADAPTER_CONFIG, HEAD_FILE, Source, read_json
from genembed.tokens import PromptTokenizer, naming_panics
from genembed.verify import verify

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

_REPETITIONS = 5
"""So many of one character each, over names of layers, take a second at most."""

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_FEW_LAYERS = 1_000
"""So many are built in no time, whatever a configuration says."""
_OF_A_LAYER = re.compile(r"\.\d+\..*(weight|bias)$")
"""Names of weights that a model does not do without. Others may lie unused in a checkpoint: a pooler, a head, angles."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to be run."""

    source: Source
    backbone: Backbone
    tokenizer: PromptTokenizer


def load(source: Source, *, device: str, dtype: str | torch.dtype) -> Loaded:
    """Load weights and tokenizer of a resolved model."""
    target = _device(device)
    model, has_head = _load_model(source, _dtype(dtype, target))
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
    try:
        backbone = Backbone(model, source.settings, head=head, stepper=stepper, has_head=has_head or head is not None)
        tokenizer = PromptTokenizer(_own_tokenizer(source.tokenizer, len(backbone.table)), source.settings)
        verify(backbone)
    except NonFiniteError as error:
        raise CheckpointError(f"{source.base}: {error}") from error
    return Loaded(source, backbone, tokenizer)


def _load_model(source: Source, dtype: torch.dtype | str) -> tuple[PreTrainedModel, bool]:
    """Load the weights; tell whether they have a language-model head."""
    folder = source.base
    _check_layers(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # checks of many kinds, with errors that have no class in common
        raise CheckpointError(f"{folder}: its config.json is not one this Transformers version knows: {error}") from error
    if config.model_type != "bert" and getattr(config, "is_decoder", None) is False:
        raise ConfigurationError(f"{folder}: {config.model_type} encoders are not supported (BERT is); use a causal language model.")
    if config.model_type == "bert":
        _check_encoder(source)
        config.is_decoder = True
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a configuration that lies fails anywhere in the building of a model: KeyError, ZeroDivisionError, ...
        raise CheckpointError(f"{folder}: the weights do not load: {type(error).__name__}: {error}") from error
    model: PreTrainedModel = loaded[0]
    return model, _check_report(loaded[1], model, source)


def _check_layers(folder: Path) -> None:
    """Refuse a configuration of more layers than there are weights, before a million of them, or a list of their names, are made."""
    config = read_json(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    layers = max((part[name] for part in parts for name in _LAYERS if isinstance(part.get(name), int)), default=0)
    weights = 0
    for path in folder.glob("*.safetensors"):
        with (
            suppress(OSError, SafetensorError),
            safe_open(path, "pt") as file,
        ):  # whoever reads it for its weights says what is wrong with it
            weights += len(file.keys())
    if layers > max(weights, _FEW_LAYERS):
        raise CheckpointError(
            f"{folder}: config.json says {layers} layers, but there are only {weights} weights; they do not belong together."
        )


def _check_encoder(source: Source) -> None:
    if source.settings.attention == "causal":
        raise ConfigurationError(f"{source.base}: an encoder has to be read with attention='prefix' (or 'bidirectional'), not 'causal'.")


def _check_report(report: dict[str, Any], model: PreTrainedModel, source: Source) -> bool:
    """Refuse a checkpoint that leaves weights at random, unless they are a head that is replaced or never used.

    Returns:
        Whether the model has a language-model head of its own.
    """
    head_unused = source.head is not None or source.settings.halt.max_steps == 0
    body = f"{model.base_model_prefix}."
    missing = {name for name in report["missing_keys"] if name.startswith(body) or not head_unused}
    if missing:
        raise CheckpointError(
            f"{source.base}: weights are missing and would be random: {', '.join(sorted(missing)[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. An encoder needs a trained {HEAD_FILE} to generate."
        )
    left_out = sorted(name for name in report["unexpected_keys"] if _OF_A_LAYER.search(name))
    if left_out:
        raise CheckpointError(
            f"{source.base}: config.json leaves out {len(left_out)} weights of layers, first {left_out[0]}; they do not belong together."
        )
    if report["mismatched_keys"]:
        raise CheckpointError(
            f"{source.base}: weights have other shapes than config.json says: {sorted(map(str, report['mismatched_keys']))[:3]}"
        )
    return not report["missing_keys"]


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, sharing its embedding table."""
    table = model.get_input_embeddings().weight
    return copy.deepcopy(model, {id(table): table})


def check_adapter(config: dict[str, Any], name: str) -> None:
    """Refuse an adapter's configuration that could open other files, change the number of layers, or hold up whoever loads it.

    Other kinds than LoRA name further files, pickles among them. Patterns are matched with the name of every layer, and Python's
    matching takes exponential time where what is repeated repeats something itself.

    Args:
        config: What `adapter_config.json` holds.
        name: Of that file, for the message.

    Raises:
        CheckpointError: With the reason.
    """
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{name}: peft_type is {config.get('peft_type')!r:.80}; only LoRA adapters are read ('LORA').")
    if config.get("layer_replication"):
        raise CheckpointError(f"{name}: layer_replication repeats layers, which is not supported; merge the adapter into its base first.")
    for pattern in _patterns(config):
        plain = re.sub(r"\\.", "_", pattern, flags=re.DOTALL)  # what is escaped repeats nothing
        if re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > _REPETITIONS:
            raise CheckpointError(
                f"{name}: the pattern {pattern!r:.80} repeats a group, or has more than {_REPETITIONS} repetitions, and could take for "
                "ever to match; name the layers in a list."
            )


def _patterns(config: dict[str, Any]) -> list[str]:
    """Return what PEFT takes for regular expressions."""
    fields = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")
    values = [config.get(name) for name in fields]
    several = [[value] if isinstance(value, str) else value for value in values if isinstance(value, (str, list, dict))]
    return [pattern for own in several for pattern in own if isinstance(pattern, str)]


def attach_adapter(model: PreTrainedModel, adapter: Path, *, trainable: bool = False) -> Any:
    """Put a LoRA adapter into a model, beside its weights, and return PEFT's model of the two.

    Args:
        model: The base; its layers are replaced in place.
        adapter: The adapter's folder.
        trainable: Whether the adapter's weights want gradients.

    Raises:
        CheckpointError: If the adapter does not fit the model.
    """
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        pickled = [path.name for path in adapter.glob("adapter_model.bin")]
        raise CheckpointError(f"{adapter}: no {ADAPTER_WEIGHTS}{'; ' + pickled[0] + ' is pickled and is not read' if pickled else ''}.")
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    check_adapter(read_json(adapter / ADAPTER_CONFIG), str(adapter / ADAPTER_CONFIG))
    try:
        with quiet(), warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            peft_model = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable, local_files_only=True)
            stored = set(load_file(adapter / ADAPTER_WEIGHTS))
            # Not `auto`, PEFT's default: that asks the hub for the base model's config.json.
            expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a configuration that lies fails anywhere in PEFT: re.error, OverflowError, IndexError, ...
        raise CheckpointError(
            f"{adapter}: does not fit the base model {model.config.name_or_path!r}; was it trained over another one? ({error})"
        ) from error
    if stored != expected:
        odd = sorted(stored ^ expected)
        raise CheckpointError(
            f"{adapter}: does not fit the base model {model.config.name_or_path!r}: {len(odd)} weights have no counterpart, first {odd[0]}."
        )
    return peft_model


def _merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Add a LoRA adapter to the weights.

    Raises:
        CheckpointError: If the adapter does not fit the model.
    """
    peft_model = attach_adapter(model, adapter)
    try:
        with quiet():
            return peft_model.merge_and_unload()  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{adapter}: this kind of adapter cannot be merged into the weights; use LoRA. ({error})") from error


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder.

    Raises:
        CheckpointError: If there is none, or it does not load.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder}: no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy it from the base model.")
    try:
        with quiet(), naming_panics("the tokenizer"):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise CheckpointError(f"{folder}: its tokenizer does not load: {error}") from error


def _own_tokenizer(folder: Path, vocab: int) -> Any:
    """Load a tokenizer whose every id has a row in the embedding table."""
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocab:
        raise CheckpointError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab}; they do not belong together.")
    return tokenizer


def _load_head(source: Source, model: PreTrainedModel) -> SoftTokenHead | None:
    if source.head is None:
        return None
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    try:
        state = load_file(source.head)
        head = SoftTokenHead(table.shape[1], table.shape[0], _spoken_tokens(state.get("tokens"), len(table)))
        head.load_state_dict(state)
    except (RuntimeError, SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source.head}: does not fit a model with {table.shape[0]} tokens of {table.shape[1]} dimensions: {error}"
        ) from error
    return head.to(table.dtype)


def _spoken_tokens(tokens: Tensor | None, vocab: int) -> Tensor | None:
    """Check the ids that a head can speak."""
    if tokens is None:
        return None
    ascending = tokens.dtype == torch.long and tokens.dim() == 1 and len(tokens) > 0 and bool((tokens.diff() > 0).all())
    if not ascending or int(tokens[0]) < 0 or int(tokens[-1]) >= vocab:
        raise ValueError(f"tokens must be ascending ids below {vocab}")
    return tokens


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
def quiet() -> Iterator[None]:
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
