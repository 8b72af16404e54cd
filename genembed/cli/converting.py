"""A model in the form that another tool reads: `genembed convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from genembed.cli.options import Json, command
from genembed.cli.output import print_result


class Target(StrEnum):
    """What a model can be converted to."""

    sentence_transformers = "sentence-transformers"


@command
def convert(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new, or empty.")],
    *,
    to: Annotated[
        Target, typer.Option("--to", help="sentence-transformers: a folder for SentenceTransformer(OUT, trust_remote_code=True).")
    ],
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter (folder or hub id) over the model.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="How the model makes an embedding, where its folder does not say: gircse, laser, causal-eos, ...")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as another tool reads it."""
    writers = {Target.sentence_transformers: _sentence_transformers}
    line = writers[to](model, output, adapter, preset, offline)
    print_result({"output": str(output), "to": to.value, "model": model}, line, as_json=as_json)


def _sentence_transformers(model: str, output: Path, adapter: str | None, preset: str | None, offline: bool) -> str:
    from genembed.integrations.sentence_transformers_folder import write_folder

    source = write_folder(model, output, adapter=adapter, preset=preset, offline=offline)
    kind = "a merged model" if source.adapter is None else f"an adapter over {source.base}"
    return f"{output}: {kind}; SentenceTransformer({str(output)!r}, trust_remote_code=True)"
