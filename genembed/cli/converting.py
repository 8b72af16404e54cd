"""A model in another form: `genembed convert`; and what its eight-bit vectors need: `genembed calibrate-ranges`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genembed.cli.options import FileOptions, Json, LoadOptions, RefineOptions, command
from genembed.cli.output import print_result
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np

    from genembed.checkpoint import Loaded

SENTENCES = (
    "Copy a directory tree.",
    "how do I duplicate a folder?",
    "Wait until all threads have reached the barrier.",
    "Alpha-lipoic acid lowers fasting glucose in patients with diabetes.",
    "Berlin is the capital of Germany.",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
)
"""What the converted model is compared on with the one it came from."""


class Target(StrEnum):
    """What a model can be converted to."""

    merged = "merged"
    onnx = "onnx"
    sentence_transformers = "sentence-transformers"


@dataclass(frozen=True, kw_only=True)
class ConvertedModel:
    """A conversion that is done: vectors of `SENTENCES` before and after."""

    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True, kw_only=True)
class OriginOptions:
    """Where the model that is converted comes from."""

    adapter: Annotated[str | None, typer.Option(help="LoRA adapter (folder or hub id) over the model.")] = None
    preset: Annotated[
        str | None, typer.Option(help="How the model makes an embedding, where its folder does not say: gircse, laser, causal-eos, ...")
    ] = None
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False

    def load(self, model: str, dtype: str) -> Loaded:
        """Load the model on the CPU, its weights as they are stored and not packed for speed."""
        from genembed import checkpoint, source

        found = source.resolve(model, adapter=self.adapter, preset=self.preset, offline=self.offline)
        return checkpoint.load(found, device="cpu", dtype=dtype)


@command
def convert(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that is made; it must not be there, or be empty.")],
    *,
    to: Annotated[
        Target,
        typer.Option(
            help="merged: full weights without an adapter. onnx: graphs for onnxruntime. sentence-transformers: a folder for "
            "SentenceTransformer(OUT, trust_remote_code=True)."
        ),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8"], typer.Option(help="Of the weights; int8 for onnx, bfloat16 for merged alone.")
    ] = "float32",
    as_json: Json = False,
    origin: OriginOptions,
) -> None:
    """Write a model in another form, and compare the two on a few sentences."""
    done = _CONVERSIONS[to](model, output, dtype, origin)
    cosines = (done.before * done.after).sum(-1)
    value: dict[str, Any] = {
        "output": str(output),
        "to": to.value,
        "dtype": dtype,
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "largest_difference": float(abs(done.before - done.after).max()),
    }
    line = (
        "{output}: {to}, {dtype}, {megabytes:.1f} MB; to the model in float32 on {count} sentences: cosine {cosine_mean:.6f} on average, "
        "{cosine_min:.6f} at least, largest difference {largest_difference:.1e}"
    )
    print_result(value, line.format(megabytes=value["bytes"] / 1e6, count=len(SENTENCES), **value), as_json=as_json)


def _to_merged(model: str, output: Path, dtype: str, origin: OriginOptions) -> ConvertedModel:
    import genembed
    from genembed.export.merged import check_mergeable, write_merged

    loaded = origin.load(model, "float32")
    check_mergeable(loaded, dtype)
    plain = genembed.Budget(pack_weights=False)  # a packed layer could not be written
    before = genembed.Embedder(loaded, budget=plain).encode(SENTENCES)
    write_merged(loaded, output, dtype)
    return ConvertedModel(before=before, after=genembed.load(output, device="cpu", dtype="float32", budget=plain).encode(SENTENCES))


def _to_onnx(model: str, output: Path, dtype: str, origin: OriginOptions) -> ConvertedModel:
    import genembed
    from genembed.export.onnx import export_onnx
    from genembed.export.onnx_embedder import OnnxEmbedder

    loaded = origin.load(model, "float32" if dtype == "int8" else dtype)
    export_onnx(loaded, output, quantised=dtype == "int8")
    exact = loaded if dtype != "float16" else origin.load(model, "float32")
    before = genembed.Embedder(exact, budget=genembed.Budget(pack_weights=False)).encode(SENTENCES)
    return ConvertedModel(before=before, after=OnnxEmbedder(output).encode(SENTENCES))


def _to_sentence_transformers(model: str, output: Path, dtype: str, origin: OriginOptions) -> ConvertedModel:
    import genembed
    from genembed.integrations.sentence_transformers_folder import encode_with, write_folder

    if dtype != "float32":
        raise ConfigurationError(f"--dtype {dtype}: the folder keeps the model's own weights; convert it --to merged first.")
    found = write_folder(model, output, adapter=origin.adapter, preset=origin.preset, offline=origin.offline)
    before = genembed.load(model, adapter=origin.adapter, preset=found.preset, device="cpu", dtype="float32", offline=origin.offline)
    return ConvertedModel(before=before.encode(SENTENCES), after=encode_with(output, SENTENCES))


_CONVERSIONS: dict[Target, Callable[[str, Path, str, OriginOptions], ConvertedModel]] = {
    Target.merged: _to_merged,
    Target.onnx: _to_onnx,
    Target.sentence_transformers: _to_sentence_transformers,
}


@command
def calibrate_ranges(
    model: Annotated[str, typer.Argument(help="Model folder; the ranges are written into it.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Texts as those to come: txt, jsonl, csv or parquet file; - for stdin.")],
    *,
    as_json: Json = False,
    loading: LoadOptions,
    refining: RefineOptions,
    reading: FileOptions,
) -> None:
    """Measure the range of every dimension on some hundred texts, for vectors in int8."""
    import json

    from genembed.files import read_texts, replacing
    from genembed.precision import RANGES_FILE, Ranges, ranges_to_json, truncate

    if reading.id_column is not None:
        raise ConfigurationError(f"--id-column {reading.id_column}: ranges know no ids; leave it out.")
    if not Path(model).expanduser().is_dir():
        raise ConfigurationError(
            f"{model}: ranges are written into the model's own folder, and this is none; make one: "
            f"genembed.load({model!r}).save_pretrained('my-model')"
        )
    embedder = loading.load(model)
    folder = embedder.source.adapter or embedder.source.base
    texts = [record.text for record in read_texts(source, file_format=reading.file_format, text_column=reading.text_column)]
    vectors = refining.refine(embedder, texts, instruction=None).vectors
    widths = (*embedder.settings.matryoshka_dims, embedder.get_embedding_dimension())
    ranges = {dims: Ranges.of(truncate(vectors, dims)) for dims in dict.fromkeys(widths)}
    value = ranges_to_json(ranges, texts=len(texts), halt=repr(refining.rule(embedder.settings)), instruction=refining.instruction)
    with replacing(folder / RANGES_FILE) as file:
        file.write((json.dumps(value) + "\n").encode())
    summary = {"written": str(folder / RANGES_FILE), "texts": len(texts), "dimensions": sorted(ranges)}
    line = f"{summary['written']}: ranges of {', '.join(map(str, sorted(ranges)))} dimensions, from {len(texts)} texts"
    print_result(summary, line, as_json=as_json)
