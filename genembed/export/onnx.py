"""From a model to two ONNX graphs: one reads prompts, one does a step; and the weights of both in one file."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import genembed
from genembed.checkpoint import Loaded
from genembed.errors import ConfigurationError, missing_extra
from genembed.export.graphs import PrefillGraph, StepGraph, traceable
from genembed.files import replacing_folder
from genembed.hub import check_target, write_settings
from genembed.precision import RANGES_FILE
from genembed.source import EXPORT_FILE
from genembed.tokens import TokenBatch

PREFILL, STEP, WEIGHTS = "prefill.onnx", "step.onnx", "weights.data"
"""Files of an exported model, beside its description, its settings and its tokenizer."""

OPSET = 18
"""The newest that Torch's tracing exporter writes without a conversion."""

_FORMAT_VERSION = 1
_MINIMUM_BYTES = 1024
"""Smaller weights stay in the graph."""
_LENGTHS = (4, 6)
"""Prompts that are traced."""


@torch.no_grad()
def export_onnx(model: Loaded, folder: Path, *, quantised: bool = False) -> None:
    """Write a model as ONNX graphs that `OnnxEmbedder` runs; the folder is complete or absent.

    Args:
        model: On the CPU, its weights not packed; its dtype is that of the graphs.
        folder: Created.
        quantised: Write the weights of linear layers in 8 bits; activations are quantised while the graph runs.

    Raises:
        MissingExtraError: If onnx or onnxruntime is not installed.
        ConfigurationError: If the model cannot be exported; the message has the reason.
    """
    _check_installed()
    check_exportable(model, quantised=quantised)
    check_target(folder)
    with replacing_folder(folder) as staged:
        with traceable(model.backbone), _quiet():
            names = _trace_prefill(model, staged / PREFILL)
            if model.backbone.has_head and model.backbone.settings.attention != "bidirectional":
                _trace_step(model, staged / STEP, names, untied=quantised)
        if quantised:
            for path in staged.glob("*.onnx"):
                _quantise(path)
        _share_weights(staged)
        _write_description(model, staged, layers=len(names) // 2, quantised=quantised)
        _check(model, staged, exact=not quantised)


def check_exportable(model: Loaded, *, quantised: bool) -> None:
    """Refuse a model whose graphs would not be right.

    Raises:
        ConfigurationError: With the reason and the way out.
    """
    backbone, settings, name = model.backbone, model.backbone.settings, type(model.backbone.model).__name__
    if backbone.device.type != "cpu":
        raise ConfigurationError(f"device={backbone.device}: graphs are traced on the CPU; load the model with device='cpu'.")
    if backbone.dtype == torch.bfloat16:
        raise ConfigurationError(
            "dtype=bfloat16: onnxruntime has no bfloat16 products for a CPU, so the graphs would not run. Weights that are stored in "
            "bfloat16 are exported from float32: genembed convert MODEL OUT --to onnx --dtype float32, or float16 or int8 for smaller "
            "files; in Python load the model with dtype='float32'."
        )
    if quantised and backbone.dtype != torch.float32:
        raise ConfigurationError(f"int8 is made from float32 weights, and these are {backbone.dtype}; load the model with dtype='float32'.")
    if settings.parallel_passes:
        raise ConfigurationError(f"parallel_passes={settings.parallel_passes}: the graphs go step by step; load it with parallel_passes=0.")
    if backbone.has_sliding_window and (settings.padding_side == "right" or not backbone.causal):
        raise ConfigurationError(
            f"{name}: its sliding window is exported for causal attention and padding on the left alone, and the settings say "
            f"attention={settings.attention!r}, padding_side={settings.padding_side!r}."
        )


def _trace_prefill(model: Loaded, path: Path) -> list[str]:
    """Write the graph that reads prompts, and return the names of its keys and values."""
    backbone, batch = model.backbone, _example(model)
    graph, arguments = PrefillGraph(backbone).eval(), (batch.input_ids, batch.mask, batch.positions)
    layers = (len(_attempt(graph, arguments)) - 2) // 2
    names = [f"{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]
    axes = _axes(["input_ids", "mask", "positions"], {0: "rows", 1: "prompt"})
    axes |= _axes(names, {0: "rows", 2: "prompt"}) | _axes(["last_hidden", "mean_hidden"], {0: "rows"})
    _export(graph, arguments, path, ["input_ids", "mask", "positions"], ["last_hidden", "mean_hidden", *names], axes)
    return names


def _trace_step(model: Loaded, path: Path, names: Sequence[str], *, untied: bool) -> None:
    """Write the graph of a step; its inputs of keys and values are called `past.` and the name they come out under."""
    batch = _example(model)
    last, _mean, *kept = PrefillGraph(model.backbone).eval()(batch.input_ids, batch.mask, batch.positions)
    mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.mask), 1)], dim=1)
    past = [f"past.{name}" for name in names]
    axes = {"mask": {0: "rows", 1: "length"}} | _axes(["last_hidden", "positions", "next_hidden"], {0: "rows"})
    axes |= _axes(past, {0: "rows", 2: "kept"}) | _axes(names, {0: "rows", 2: "length"})
    arguments = (last, mask, batch.mask.sum(-1), *kept)
    _export(
        StepGraph(model.backbone, untied=untied).eval(),
        arguments,
        path,
        ["last_hidden", "mask", "positions", *past],
        ["next_hidden", *names],
        axes,
    )


def _axes(names: Sequence[str], changing: dict[int, str]) -> dict[str, dict[int, str]]:
    """Say which dimensions of these tensors may have another size."""
    return {name: dict(changing) for name in names}


def _example(model: Loaded) -> TokenBatch:
    vocab = len(model.backbone.table)
    prompts = [(torch.arange(length) % vocab).numpy() for length in _LENGTHS]
    return TokenBatch.pad(prompts, side=model.backbone.settings.padding_side)


def _attempt(graph: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run a graph in Torch: an architecture that does not call our attention shows here."""
    try:
        result: tuple[Tensor, ...] = graph(*arguments)
    except (TypeError, RuntimeError, IndexError, ValueError) as error:
        raise ConfigurationError(f"this model cannot be written as a graph over its own keys and values: {error}") from error
    return result


def _export(
    graph: nn.Module, arguments: tuple[Tensor, ...], path: Path, inputs: list[str], outputs: list[str], axes: dict[str, dict[int, str]]
) -> None:
    """Trace a graph.

    With Torch's tracing exporter: what is traced here has no branch that could be lost, and the newer exporter gives the same states in
    many times the time (docs/LOG.md).
    """
    try:
        torch.onnx.export(
            graph, arguments, str(path), dynamo=False, opset_version=OPSET, input_names=inputs, output_names=outputs, dynamic_axes=axes
        )
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        raise ConfigurationError(f"{path.stem}: Torch cannot export this model to ONNX: {error}") from error


def _quantise(path: Path) -> None:
    """Write the products of linear layers in 8 bits, in place; the soft token is made in the precision it has.

    Unsigned weights: processors without VNNI add two products of an unsigned and a signed byte in 16 bits, which overflow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            path,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=_products_of_the_vocabulary(path),
            use_external_data_format=True,
        )


def _products_of_the_vocabulary(path: Path) -> list[str]:
    """Return the names of the products outside the layers: the head and the average over the vocabulary, where rounding tells most."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    names = [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and not node.name.startswith(("/base/", "/stepper/"))]
    return [*names, *(f"{name}_MatMul" for name in names)]  # as the quantiser calls a Gemm that it has taken apart


def _share_weights(folder: Path) -> None:
    """Move the weights of all graphs into one file, each of them once: both graphs read with the same layers."""
    import onnx
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, int] = {}
    models = {path: onnx.load(str(path)) for path in sorted(folder.glob("*.onnx"))}
    for path in folder.iterdir():
        path.unlink()
    with (folder / WEIGHTS).open("wb") as file:
        for path, model in models.items():
            for tensor in _large_tensors(model):
                data = tensor.raw_data
                digest = hashlib.sha256(data).digest()
                if digest not in places:
                    places[digest] = file.tell()
                    file.write(data)
                set_external_data(tensor, WEIGHTS, offset=places[digest], length=len(data))
                tensor.ClearField("raw_data")
            path.write_bytes(model.SerializeToString())


def _large_tensors(model: Any) -> Iterator[Any]:
    """Yield the weights of a graph, also those that tracing has written as constants."""
    constants = (attribute.t for node in model.graph.node if node.op_type == "Constant" for attribute in node.attribute)
    for tensor in (*model.graph.initializer, *constants):
        if len(tensor.raw_data) >= _MINIMUM_BYTES:
            yield tensor


def _write_description(model: Loaded, folder: Path, *, layers: int, quantised: bool) -> None:
    backbone, source = model.backbone, model.source
    value = {
        "format_version": _FORMAT_VERSION,
        "model": source.name,
        "opset": OPSET,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "weights": "int8" if quantised else str(backbone.dtype).removeprefix("torch."),
        "dimensions": backbone.hidden_size,
        "layers": layers,
        "max_positions": backbone.max_positions,
        "genembed": genembed.__version__,
    }
    (folder / EXPORT_FILE).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    write_settings(model.backbone.settings, folder)
    model.tokenizer.tokenizer.save_pretrained(folder)
    if source.ranges is not None:
        shutil.copyfile(source.ranges, folder / RANGES_FILE)


def _check(model: Loaded, folder: Path, *, exact: bool) -> None:
    """Run the graphs on other prompts than the traced ones, and compare them with the model itself.

    Raises:
        ConfigurationError: If they fail, or give other states.
    """
    from genembed.export.onnx_embedder import OnnxEmbedder, OnnxRows
    from genembed.rows import CachedRows

    backbone, settings = model.backbone, model.backbone.settings
    prompts = [(torch.arange(length) * 3 + 1).remainder(len(backbone.table)).numpy() for length in (7, 1, 3)]
    batch = TokenBatch.pad(prompts, side=settings.padding_side)
    try:
        ours, theirs = OnnxRows(OnnxEmbedder(folder), batch), CachedRows(backbone, batch)
        pairs = [(ours.last_hidden, theirs.last_hidden), (ours.mean_hidden, theirs.mean_hidden)]
        if (folder / STEP).is_file():
            ours.generate()
            theirs.generate()
            pairs.append((ours.last_hidden, theirs.last_hidden))
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ConfigurationError(
            f"{type(backbone.model).__name__}: onnxruntime cannot run its graphs on prompts of other lengths than the traced ones: {error}"
        ) from error
    worst = max(float((own - other).abs().max() / other.abs().max()) for own, other in pairs)
    tolerance = 1e-3 if exact and backbone.dtype != torch.float16 else 0.5
    if not worst <= tolerance:
        raise ConfigurationError(
            f"{type(backbone.model).__name__}: its exported graphs give other states than the model (by {worst:.2g}), so it cannot be "
            "exported."
        )


def _check_installed() -> None:
    for module in ("onnx", "onnxruntime"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            raise missing_extra("onnx", module) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporter and quantiser say about themselves off the terminal; what they wrote is compared with the model."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
