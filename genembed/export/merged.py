"""From an adapter to full weights, in the precision they are wanted in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from genembed.checkpoint import Loaded, quiet
from genembed.errors import ConfigurationError
from genembed.files import replacing_folder
from genembed.hub import check_target, write_settings
from genembed.precision import RANGES_FILE
from genembed.source import HEAD_FILE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of weights in a folder of safetensors."""

_RECORDS = ("recipe.json", "history.csv", "calibration.json")


def check_mergeable(model: Loaded, dtype: str) -> None:
    """Refuse what cannot be written as one set of full weights.

    Raises:
        ConfigurationError: With the reason and the way out.
    """
    if dtype == "int8":
        raise ConfigurationError(
            "--dtype int8 --to merged: there is no 8-bit form of a weights folder that is as fast as what it replaces; use bfloat16, or "
            "int8 graphs: --to onnx --dtype int8."
        )
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}.")
    if model.backbone.adapter_on_generated_only:
        raise ConfigurationError(
            f"{model.source.name}: its adapter works on generated positions alone, and the base model reads the prompt, so the two have no "
            "weights in common; keep the adapter (save_pretrained), or write both as graphs: --to onnx."
        )


def write_merged(model: Loaded, folder: Path, dtype: str) -> None:
    """Write full weights, with the adapter added, that load without PEFT; the folder is complete or absent.

    Args:
        model: In float32. Its weights are cast in place, so that it is of no use afterwards.
        folder: Created.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        ConfigurationError: If the model has no such form, or its weights do not fit into the dtype.
    """
    check_mergeable(model, dtype)
    check_target(folder)
    backbone, source = model.backbone, model.source
    # An encoder's own language-model head is random, or replaced by the soft-token head.
    whole: Any = backbone.model if backbone.has_head and backbone.trained_head is None else backbone.base
    whole.to(DTYPES[dtype])
    if not all(bool(weight.isfinite().all()) for weight in whole.parameters()):
        raise ConfigurationError(f"dtype={dtype!r}: some weights are too large for it; choose bfloat16, which has the range of float32.")
    with replacing_folder(folder) as staged:
        with quiet():
            whole.save_pretrained(staged)
        model.tokenizer.tokenizer.save_pretrained(staged)
        if backbone.trained_head is not None:
            head = backbone.trained_head.to(DTYPES[dtype]).state_dict()
            save_file({name: value.contiguous() for name, value in head.items()}, staged / HEAD_FILE)
        own = source.adapter or source.base
        for path in (source.ranges or own / RANGES_FILE, *(own / name for name in _RECORDS)):
            if path.is_file():
                shutil.copyfile(path, staged / path.name)
        write_settings(backbone.settings, staged)
