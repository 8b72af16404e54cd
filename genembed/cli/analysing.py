"""What refinement does on a retrieval set: `genembed analyse`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from genembed.cli.options import Json, LoadOptions, command
from genembed.cli.output import print_json, print_table
from genembed.errors import ConfigurationError, missing_extra

_EXTRA = ("matplotlib", "scipy")
"""What every report needs of the extra; looked for before the model works, as the figures are drawn last."""


@command
def analyse(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")],
    *,
    corpus: Annotated[Path | None, typer.Option(help="Documents: .jsonl[.gz] with _id, text and perhaps title.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Queries: .jsonl[.gz] with _id and text.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="Judgements: BEIR's .tsv or TREC's four columns.")] = None,
    local: Annotated[Path | None, typer.Option(help="Folder with corpus.jsonl[.gz], queries.jsonl[.gz] and perhaps qrels.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report; an earlier report there gives way.")],
    halt_documents: Annotated[bool, typer.Option("--halt-documents", help="Halt documents as well as queries.")] = False,
    repeats: Annotated[int, typer.Option(help="Turns in which seconds are measured; 0 measures none.")] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Steps of the full refinement; those of the model's rule if not given.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Instruction of the queries; the model's own one if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of splits, resamples and null models.")] = 0,
    as_json: Json = False,
    loading: LoadOptions,
) -> None:
    """Write a report of what refinement and halting do on a retrieval set: the paper's tables and figures, null models, further rules."""
    for package in _EXTRA:
        if importlib.util.find_spec(package) is None:
            raise missing_extra("analyse", package)
    from genembed.analyse.document import check_target
    from genembed.analyse.findings import Settings, find
    from genembed.analyse.report import headline, report
    from genembed.files import replacing_folder
    from genembed.testsets import read_retrieval_set

    settings = Settings(instruction=instruction, max_steps=max_steps, halt_documents=halt_documents, repeats=repeats, seed=seed)
    check_target(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(output) as folder:
        data = read_retrieval_set(*_files(corpus, queries, qrels, local))
        embedder = loading.load(model)
        found = find(embedder, data, settings, show_progress_bar=True)
        report(found, embedder, data, settings).write(folder)
    table = headline(found)
    if as_json:
        print_json({"written": str(output), **table.to_json()})
    else:
        print_table([column.heading for column in table.columns], table.cells(), left=("rule",), title=table.caption, wrap=True)
        typer.echo(f"written: {output / 'index.html'}")


def _files(corpus: Path | None, queries: Path | None, qrels: Path | None, local: Path | None) -> tuple[Path, Path, Path | None]:
    """Return corpus, queries and judgements."""
    from genembed.testsets import retrieval_files

    given = [f"--{name} {path}" for name, path in (("corpus", corpus), ("queries", queries), ("qrels", qrels)) if path is not None]
    if local is None:
        if corpus is None or queries is None:
            raise ConfigurationError("--corpus and --queries are needed, or --local with the folder that has both.")
        return corpus, queries, qrels
    if given:
        raise ConfigurationError(f"--local {local} and {given[0]} both say what to read; give one of them.")
    return retrieval_files(local, judged=False)
