"""The demonstration: search the docstrings of Python's standard library, and measure what halting saves."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
from tqdm import tqdm

from genembed.docstrings import Docstring, standard_library
from genembed.embedder import Embedder
from genembed.errors import ConfigurationError, missing_extra
from genembed.fingerprint import fingerprint, is_fingerprint
from genembed.halting import FixedSteps, HaltingRule
from genembed.index import DESCRIPTION_FILE, Hit, Index, docstring_passage, passages_hash
from genembed.index.passages import beginning_of

try:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as missing:
    raise missing_extra("cli", "rich") from missing

QUERIES = (
    "copy a directory tree with all its files",
    "wait for several threads to reach the same point",
    "parse command line arguments",
    "a queue where the smallest item comes out first",
    "difference between two dates",
)
_HITS = 3
_COMPARED_QUERIES = 200
_COMPARED_HITS = 10
_REPEATS = 3
_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a query found."""

    query: str
    steps: int
    """Refinement steps the query took."""
    seconds: float
    """Time for the query's vector and the search."""
    hits: Sequence[Hit]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long the same queries took under one halting rule."""

    rule: str
    seconds: float
    """Median of the repetitions."""
    fastest: float
    slowest: float
    iterations: int
    """Refinement steps of all queries together."""
    mean_steps: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The same queries with all steps and with the model's halting rule."""

    queries: int
    repeats: int
    every_step: Timing
    halting: Timing
    agreement: float
    """Share of the first ten hits that both find, mean over the queries."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Everything the demonstration measured."""

    model: str
    folder: str
    reused: bool
    rows: int
    index_seconds: float
    index_steps: float
    answers: Sequence[Answer]
    comparison: Comparison | None
    """None for a model whose rule never halts before the last step."""


def run(embedder: Embedder, *, rows: int, folder: Path | None, quiet: bool = False) -> Demonstration:
    """Index the standard library, search it, and compare halting with doing every step.

    Args:
        embedder: The model.
        rows: Docstrings to index, at most.
        folder: Where the index is kept; a folder in the user's cache if None.
        quiet: Show nothing; otherwise results are printed as they come.

    Raises:
        ConfigurationError: If `rows` is not positive, or `folder` holds another index.
    """
    if rows < 1:
        raise ConfigurationError(f"rows={rows}: at least one docstring has to be indexed.")
    console = _console(quiet=quiet)
    documented = _chosen(standard_library(show_progress_bar=True), rows)
    index, reused = _index(embedder, documented, folder)
    _show_index(console, embedder, index, reused=reused)
    answers = []
    for query in QUERIES:
        answers.append(ask(embedder, index, query))
        _show_answer(console, answers[-1])
    comparison = None
    if isinstance(embedder.settings.halt, FixedSteps):
        console.print(Text(f"This model does {embedder.settings.halt} for every text: there is no halting to compare.", style="dim"))
    else:
        comparison = compare(embedder, index, _short_texts(documented))
        _show_comparison(console, comparison)
    return Demonstration(
        model=embedder.source.name,
        folder=str(index.folder),
        reused=reused,
        rows=len(index),
        index_seconds=index.description.seconds,
        index_steps=index.description.steps,
        answers=answers,
        comparison=comparison,
    )


def ask(embedder: Embedder, index: Index, query: str) -> Answer:
    """Search for one query."""
    begin = time.perf_counter()
    refinement = embedder.refine([query], instruction=embedder.settings.query_instruction)
    hits = index.search(refinement.vectors[0], k=_HITS)
    return Answer(query=query, steps=int(refinement.steps[0]), seconds=time.perf_counter() - begin, hits=hits)


def compare(embedder: Embedder, index: Index, queries: Sequence[str]) -> Comparison:
    """Embed the same queries with the model's halting rule and with all its steps, in turns, and compare what they find."""
    halt = embedder.settings.halt
    rules: dict[str, HaltingRule] = {"every_step": FixedSteps(halt.max_steps), "halting": halt}
    seconds: dict[str, list[float]] = {name: [] for name in rules}
    refined = {}
    embedder.refine(queries[:8])  # the first call of a model pays for its memory
    turns = tqdm(list(rules.items()) * _REPEATS, desc="comparing", unit="run", delay=1, leave=False)
    for name, rule in turns:
        begin = time.perf_counter()
        refined[name] = embedder.refine(queries, instruction=embedder.settings.query_instruction, halt=rule)
        seconds[name].append(time.perf_counter() - begin)
    found = {name: [_references(index, vector) for vector in refined[name].vectors] for name in rules}
    shared = [len(every & halted) / len(every) for every, halted in zip(found["every_step"], found["halting"], strict=True)]
    timings = {
        name: Timing(
            rule=repr(rule),
            seconds=median(seconds[name]),
            fastest=min(seconds[name]),
            slowest=max(seconds[name]),
            iterations=int(refined[name].steps.sum()),
            mean_steps=float(refined[name].steps.mean()),
        )
        for name, rule in rules.items()
    }
    return Comparison(queries=len(queries), repeats=_REPEATS, agreement=fmean(shared), **timings)


def _chosen(documented: Sequence[Docstring], rows: int) -> list[Docstring]:
    """Take functions and classes first, and of the methods as many as there is room for, from all modules alike."""
    first = [docstring for docstring in documented if docstring.kind != "method"][:rows]
    methods = [docstring for docstring in documented if docstring.kind == "method"]
    room = min(rows - len(first), len(methods))
    return first + [methods[place * len(methods) // room] for place in range(room)]


def _index(embedder: Embedder, documented: Sequence[Docstring], folder: Path | None) -> tuple[Index, bool]:
    """Open the index of an earlier run if it would come out the same now, or build it."""
    own = folder is None
    folder = _cache_folder(embedder, len(documented)) if folder is None else folder
    passages = [docstring_passage(docstring, docstring.name) for docstring in documented]
    if (folder / DESCRIPTION_FILE).is_file():
        index = Index.open(folder)
        made = index.description
        same = (made.passages, made.halt) == (passages_hash(passages), repr(embedder.settings.halt))
        if same and is_fingerprint(made.fingerprint, embedder):
            return index, True
        if not own:
            raise ConfigurationError(
                f"{folder}: holds another index ({len(index)} texts, made by {made.model}); delete it or choose another folder."
            )
    if own:
        folder.parent.mkdir(parents=True, exist_ok=True)
    return Index.build(folder, embedder, passages, overwrite=own, show_progress_bar=True), False


def _cache_folder(embedder: Embedder, rows: int) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "genembed" / f"demo-python{platform.python_version()}-{rows}-{fingerprint(embedder)[:12]}"


def _short_texts(documented: Sequence[Docstring]) -> list[str]:
    """Return beginnings of docstrings, evenly spread over all of them."""
    lines = list(dict.fromkeys(beginning_of(docstring.summary) for docstring in documented))
    return lines[:: max(1, len(lines) // _COMPARED_QUERIES)][:_COMPARED_QUERIES]


def _references(index: Index, vector: np.ndarray) -> set[str]:
    return {hit.reference for hit in index.search(vector, k=_COMPARED_HITS)}


def _console(*, quiet: bool) -> Console:
    console = Console(quiet=quiet, highlight=False)
    console.width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
    return console


def _show_index(console: Console, embedder: Embedder, index: Index, *, reused: bool) -> None:
    console.print(Text("Searching the docstrings of Python's own standard library", style="bold"))
    made = index.description
    pace = f"{made.seconds:.1f} s ({len(index) / made.seconds:.0f} a second)"
    lines = {
        "Model": f"{embedder.source.name}, {made.dimensions} dimensions",
        "Halting": made.halt,
        "Index": f"{len(index)} docstrings of Python {platform.python_version()}, refined in {made.steps:.1f} steps on average",
        "Time": f"{pace}, on an earlier run; reused now" if reused else pace,
        "Folder": str(index.folder),
    }
    for name, value in lines.items():
        console.print(Text.assemble((f"{name:<9}", "dim"), value), soft_wrap=True)
    console.print()


def _show_answer(console: Console, answer: Answer) -> None:
    took = f"   {answer.steps} steps, {1000 * answer.seconds:.0f} ms"
    console.print(Text.assemble((answer.query, "bold cyan"), (took, "dim")))
    width = max((len(hit.reference) for hit in answer.hits), default=0)
    for hit in answer.hits:
        line = Text.assemble(f"  {hit.score:.3f}  ", (f"{hit.reference:<{width}}", "green"), f"  {hit.summary}")
        console.print(line, no_wrap=True, overflow="ellipsis")
    console.print()


def _show_comparison(console: Console, comparison: Comparison) -> None:
    every, halting = comparison.every_step, comparison.halting
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left", title_style="bold")
    table.title = f"{comparison.queries} short texts with and without halting, median of {comparison.repeats} runs in turns"
    table.add_column("halting rule", overflow="fold")
    for heading in ("time", "fastest to slowest", "iterations", "steps, mean"):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing in (every, halting):
        spread = f"{timing.fastest:.2f} to {timing.slowest:.2f} s"
        table.add_row(timing.rule, f"{timing.seconds:.2f} s", spread, f"{timing.iterations}", f"{timing.mean_steps:.2f}")
    console.print(table)
    console.print(
        Text(
            f"Halting did {every.iterations / halting.iterations:.1f} times fewer iterations in {halting.seconds / every.seconds:.0%} of "
            "the time. The two are not the same: each text is read once before its first iteration, and a batch that has shrunk uses the "
            f"processor less well. Of the first {_COMPARED_HITS} hits of a query, {comparison.agreement:.1%} are the same either way."
        )
    )
