"""Texts by meaning: `genembed index`, `genembed search`, and `genembed demo`, which does both."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from genembed.cli.options import FileOptions, Json, LoadOptions, Model, RefineOptions, command
from genembed.cli.output import print_json, print_result, with_bar


@command
def demo(
    *,
    model: Model = "mini",
    rows: Annotated[int, typer.Option(help="Docstrings to index, at most.")] = 3000,
    index: Annotated[Path | None, typer.Option(help="Folder of the index; one in the user's cache if not given.")] = None,
    as_json: Json = False,
    loading: LoadOptions,
) -> None:
    """Search the standard library's docstrings; see what halting saves."""
    from genembed.index import demo as demonstration

    result = demonstration.run(loading.load(model), rows=rows, folder=index, quiet=as_json)
    if as_json:
        print_json(asdict(result))


@command
def index(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files of rows (txt, jsonl, csv, parquet), text files, folders.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the index.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    model: Model = "mini",
    as_json: Json = False,
    loading: LoadOptions,
    refining: RefineOptions,
    reading: FileOptions,
) -> None:
    """Embed files and folders into a searchable index.

    A file of rows gives one passage for each row. Folders are searched for .txt, .md and .rst files, which are cut at paragraphs,
    and for .py files, which give one passage for each documented public function, class or method.
    """
    from genembed.index import Index, check_target, read_passages

    check_target(output, overwrite=overwrite)
    passages = list(with_bar(read_passages(paths, **asdict(reading)), "reading"))
    embedder = loading.load(model)
    built = Index.build(
        output,
        embedder,
        passages,
        instruction=refining.instruction,
        halt=refining.rule(embedder.settings),
        truncate=refining.truncate,
        overwrite=overwrite,
        show_progress_bar=True,
    )
    summary = {"output": str(output), **asdict(built.description)}
    line = "{output}: {rows} passages of {dimensions} dimensions, {steps:.2f} steps on average, {seconds:.1f} s".format(**summary)
    print_result(summary, line, as_json=as_json)


@command
def search(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an index.")],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    *,
    k: Annotated[int, typer.Option("--hits", "-k", help="Hits to show.")] = 10,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model that made the index, if it has moved; how it was loaded, the index knows."),
    ] = None,
    as_json: Json = False,
    loading: LoadOptions,
    refining: RefineOptions,
) -> None:
    """Find the passages of an index that are nearest to a query."""
    from genembed.index import Index

    found_in = Index.open(folder)
    made = found_in.description
    embedder = loading.load(model or made.model, adapter=made.adapter, preset=made.model_settings)
    found_in.check(embedder)
    begin = time.perf_counter()
    done = refining.refine(embedder, [query], instruction=embedder.settings.query_instruction)
    hits = found_in.search(done.vectors[0], k=k)
    seconds, steps = time.perf_counter() - begin, int(done.steps[0])
    if as_json:
        print_json({"query": query, "steps": steps, "seconds": seconds, "hits": [asdict(hit) for hit in hits]})
        return
    for hit in hits:
        typer.echo(f"{hit.score:6.3f}  {hit.reference}\n        {hit.summary}")
    typer.echo(f"{len(hits)} of {len(found_in)} passages, {steps} steps, {1000 * seconds:.0f} ms", err=True)
