"""What refinement does on a retrieval set: `genembed analyse`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genembed.cli.options import Json, LoadOptions, command
from genembed.cli.output import print_json
from genembed.errors import ConfigurationError, missing_extra

if TYPE_CHECKING:
    from genembed.analyse.document import Table

_WIDTH = 140
"""Of the table where no terminal says how wide it is."""

_EXTRA = ("matplotlib", "scipy")
"""What every report needs of the extra; looked for before the model works, as the figures are drawn last."""


@command
def analyse(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")],
    *,
    corpus: Annotated[Path | None, typer.Option(help="Documents: .jsonl[.gz] with _id, text and perhaps title.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Queries: .jsonl[.gz] with _id and text.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="Judgements: BEIR's .tsv or TREC's four columns.")] = None,
    local: Annotated[Path | None, typer.Option(help="Folder with corpus.jsonl[.gz], queries.jsonl[.gz] and perhaps qrels.tsv.")] = None,
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
    from genembed.analyse.document import replacing_folder
    from genembed.analyse.findings import Settings, find
    from genembed.analyse.report import headline, report
    from genembed.testsets import read_retrieval_set

    settings = Settings(instruction=instruction, max_steps=max_steps, halt_documents=halt_documents, repeats=repeats, seed=seed)
    with replacing_folder(output) as folder:
        data = read_retrieval_set(*_files(corpus, queries, qrels, local))
        embedder = loading.load(model)
        found = find(embedder, data, settings, show_progress_bar=True)
        report(found, embedder, data, settings).write(folder)
    table = headline(found)
    if as_json:
        print_json({"written": str(output), **table.to_json()})
    else:
        _show(table)
        typer.echo(f"written: {output / 'index.html'}")


def _files(corpus: Path | None, queries: Path | None, qrels: Path | None, local: Path | None) -> tuple[Path, Path, Path | None]:
    """Return corpus, queries and judgements."""
    given = [f"--{name} {path}" for name, path in (("corpus", corpus), ("queries", queries), ("qrels", qrels)) if path is not None]
    if local is None:
        if corpus is None or queries is None:
            raise ConfigurationError("--corpus and --queries are needed, or --local with the folder that has both.")
        return corpus, queries, qrels
    if given:
        raise ConfigurationError(f"--local {local} and {given[0]} both say what to read; give one of them.")
    judged = local / "qrels.tsv"
    return _texts(local, "corpus"), _texts(local, "queries"), judged if judged.exists() else None


def _texts(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.exists():
            return path
    raise ConfigurationError(f"{folder}: there is no {name}.jsonl or {name}.jsonl.gz in it; name the files with --corpus and --queries.")


def _show(table: Table) -> None:
    """Print a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Shown

    shown = Shown(box=box.SIMPLE_HEAD, padding=(0, 1), title=table.caption, title_justify="left")
    for column in table.columns:
        shown.add_column(column.heading, justify="left" if column.key == "rule" else "right")
    for row in table.cells():
        shown.add_row(*row)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH).print(shown)
