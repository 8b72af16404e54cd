"""One text, one vector: `genembed embed`, and `genembed info` on the model that does it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

import genembed
from genembed.cli.options import FileOptions, FormOptions, Json, LoadOptions, Model, RefineOptions, command
from genembed.cli.output import print_result, with_bar
from genembed.errors import ConfigurationError, TextError


@command
def embed(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="txt (one text a line), jsonl, csv or parquet file; - for stdin.")],
    *,
    output: Annotated[str, typer.Option("--output", "-o", help=".npy, .parquet or .jsonl file; - for JSON lines on stdout.")],
    model: Model = "mini",
    as_json: Json = False,
    loading: LoadOptions,
    refining: RefineOptions,
    writing: FormOptions,
    reading: FileOptions,
) -> None:
    """Turn the texts of a file into vectors. Without an instruction each text is read bare."""
    from genembed.files import STANDARD_STREAM, VectorRows, read_texts, vector_file

    _check_output(output, as_json=as_json, id_column=reading.id_column)
    with vector_file(output) as write:
        records = list(with_bar(read_texts(source, **asdict(reading)), "reading"))
        embedder = loading.load(model)
        form = writing.form(embedder)
        begin = time.perf_counter()
        with _naming(source, records):
            done = refining.refine(embedder, [record.text for record in records], instruction=None)
        seconds = time.perf_counter() - begin
        write(VectorRows([record.id for record in records], form(done.vectors), done.steps, done.truncated))
    summary: dict[str, Any] = {
        "output": output,
        "texts": len(records),
        "dimensions": form.dimensions,
        "precision": form.precision,
        "halt": repr(refining.rule(embedder.settings)),
        "mean_steps": float(done.steps.mean()) if records else 0.0,
        "truncated": int(done.truncated.sum()),
        "seconds": seconds,
    }
    cut = f"{summary['truncated']} texts cut at {embedder.settings.max_length} tokens, " if summary["truncated"] else ""
    numbers = "" if form.precision == "float32" else f" in {form.precision}"
    line = "{output}: {texts} vectors of {dimensions} dimensions{numbers}, {mean_steps:.2f} steps on average, {cut}{seconds:.1f} s"
    if output != STANDARD_STREAM:
        print_result(summary, line.format(cut=cut, numbers=numbers, **summary), as_json=as_json)


@command
def info(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")] = "mini",
    *,
    instruction: Annotated[str, typer.Option(help="Instruction of the second prompt shown.")] = "Find similar texts.",
    as_json: Json = False,
    loading: LoadOptions,
) -> None:
    """Show what a model is, its exact prompt, its steps and halting rule."""
    facts = _facts(loading.load(model), instruction)
    print_result(facts, "\n".join(f"{name.replace('_', ' '):<24}{_shown(value)}" for name, value in facts.items()), as_json=as_json)


@contextmanager
def _naming(source: str, records: Sequence[Any]) -> Iterator[None]:
    """Say which line of which file the row of an error is."""
    try:
        yield
    except TextError as error:
        where = source if error.row is None else f"{source}, line {records[error.row].line}"
        raise type(error)(f"{where}: {error}", row=error.row) from error


def _check_output(output: str, *, as_json: bool, id_column: str | None) -> None:
    """Refuse options that would have no effect on this output."""
    if id_column is not None and output.lower().endswith(".npy"):
        raise ConfigurationError(f"--id-column {id_column}: a .npy file holds no ids; write .parquet or .jsonl, or leave the option out.")
    if as_json and output == "-":
        raise ConfigurationError("--json describes a written file, but with -o - the vectors themselves go to stdout, as JSON lines.")


def _facts(embedder: genembed.Embedder, instruction: str) -> dict[str, Any]:
    """Return what a user may want to know about a model; texts in the prompts are the word TEXT."""
    settings, backbone, source = embedder.settings, embedder.backbone, embedder.source
    return {
        "model": source.name,
        "base": str(source.base),
        "adapter": None if source.adapter is None else str(source.adapter),
        "parameters": sum(weight.numel() for weight in backbone.model.parameters()),
        "adapter_parameters": _adapter_parameters(source.adapter),
        "head_parameters": sum(weight.numel() for weight in backbone.trained_head.parameters()) if backbone.trained_head else 0,
        "dimensions": embedder.get_embedding_dimension(),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "packing": backbone.packable,
        "done_in_c": embedder.engine.done_in_c,
        **{field.name: getattr(settings, field.name) for field in fields(settings)},
        "prompt": embedder.first_prompt("TEXT"),
        "prompt_with_instruction": embedder.first_prompt("TEXT", instruction=instruction),
    }


def _adapter_parameters(adapter: Path | None) -> int:
    from math import prod

    from safetensors import safe_open

    if adapter is None:
        return 0
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  (not a mapping)


def _shown(value: object) -> str:
    """Show a fact on one line: strings of several lines and with blanks at their ends in quotes."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}"
    if not isinstance(value, str):
        return repr(value)
    return repr(value) if value != value.strip() or not value.isprintable() else value
