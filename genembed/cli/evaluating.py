"""How good it is: `genembed evaluate`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genembed.cli.options import Json, LoadOptions, RefineOptions, command
from genembed.cli.output import print_json, print_table
from genembed.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genembed.evaluate.expansion import Expander
    from genembed.evaluate.run import Score
    from genembed.evaluate.significance import Difference


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is evaluated."""

    benchmark: Annotated[str | None, typer.Option(help="Benchmark by mteb's name, such as 'MTEB(eng, v2)'.")] = None
    task: Annotated[list[str] | None, typer.Option(help="Task by mteb's name, such as STS12; may be given several times.")] = None
    local: Annotated[
        list[Path] | None,
        typer.Option(help="Set on disk: a folder with corpus, queries and qrels, a .jsonl[.gz] file of rows, or a folder of those."),
    ] = None
    kind: Annotated[
        Literal["retrieval", "sts", "pairs", "classification", "clustering"] | None,
        typer.Option(help="What --local is, where its columns do not tell."),
    ] = None
    split: Annotated[str | None, typer.Option(help="Split of --local; test if not given, and all rows of a clustering.")] = None
    aspect: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=INSTRUCTION", help="Cluster --local FILE by this column under this instruction.")
    ] = None

    def __post_init__(self) -> None:
        """Refuse what has no effect, and nothing to do."""
        chosen = [name for name in ("benchmark", "task", "local") if getattr(self, name)]
        if len(chosen) > 1:
            raise ConfigurationError(f"--{' and --'.join(chosen)} both say what is evaluated; give one of them.")
        idle = [name for name in ("kind", "split", "aspect") if getattr(self, name)]
        if idle and not self.local:
            raise ConfigurationError(f"--{idle[0]} is for sets on disk; it has no effect without --local.")
        if self.aspect and (self.kind or self.split or len(self.local or ()) > 1):
            raise ConfigurationError("--aspect clusters all rows of one --local FILE; leave --kind, --split and other files out.")

    def tasks(self) -> list[Any]:
        """Return mteb's tasks."""
        from genembed.evaluate import tasks

        if self.benchmark is not None:
            return tasks.tasks_of_benchmark(self.benchmark)
        return tasks.named_tasks(self.task) if self.task else self._local_tasks()

    def _local_tasks(self) -> list[Any]:
        from genembed.evaluate.local import find_sets, read_set
        from genembed.evaluate.tasks import local_task

        paths = [path for given in self.local or () for path in find_sets(given)]
        if not paths:
            raise ConfigurationError("there is nothing to evaluate; give --benchmark, --task or --local.")
        found = [local_task(read_set(path, kind=self.kind, split=self.split)) for path in paths]
        names = [task.metadata.name for task in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(
                f"two sets are called {twice!r}, and results are kept by name; rename one, or evaluate them into two folders, -o."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ExpandOptions:
    """Which language model expands the texts first."""

    expand_with: Annotated[
        str | None,
        typer.Option(metavar="LM", help="Two stages: this causal language model (folder or hub id) first adds to each text what may help."),
    ] = None
    expand_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens that --expand-with adds to a text; 256, as in the paper, if not given.")
    ] = None

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if self.expand_tokens is not None and self.expand_with is None:
            raise ConfigurationError(
                f"--expand-tokens {self.expand_tokens} has no effect without --expand-with, the model that writes them."
            )

    def expander(self, loading: LoadOptions, output: Path) -> Expander | None:
        """Return the language model, which is loaded when it is first needed; None if none is wanted."""
        if self.expand_with is None:
            return None
        from genembed.evaluate.expansion import Expander
        from genembed.evaluate.writer import DEFAULT_TOKENS

        budget = DEFAULT_TOKENS if self.expand_tokens is None else self.expand_tokens
        return Expander(self.expand_with, output, budget=budget, device=loading.device, offline=loading.offline)


@command
def evaluate(
    model: Annotated[str | None, typer.Argument(help="Built-in model (mini), model folder, or hub id.")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder in which results/ is made, in mteb's layout.")] = Path(),
    bare: Annotated[
        bool, typer.Option("--bare", help="Read texts without an instruction, instead of the paper's one for the task.")
    ] = False,
    peer: Annotated[
        str | None, typer.Option(help="Evaluate another model instead: bm25, all-minilm-l6-v2, bge-large, e5-mistral, ...")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two runs, folders that hold TASK.json, item by item.")
    ] = None,
    as_json: Json = False,
    choosing: TaskOptions,
    expanding: ExpandOptions,
    loading: LoadOptions,
    refining: RefineOptions,
) -> None:
    """Evaluate a model on tasks of mteb, from the hub or on disk; finished tasks are not run again."""
    if loading.offline:  # read by the hub's libraries when they are imported
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"-o {output}: is a file; results are kept in a folder.")
    if compare is not None:
        if model is not None or peer is not None or choosing != TaskOptions() or expanding != ExpandOptions():
            raise ConfigurationError("--compare reads two runs that are there; leave the model and the tasks out.")
        _compare(*compare, as_json=as_json)
    elif (model is None) == (peer is None):
        raise ConfigurationError("one model is evaluated: give MODEL, or another one by name with --peer.")
    elif choosing.aspect:
        if model is None or bare or refining.instruction is not None:
            raise ConfigurationError("--aspect brings its own instructions and needs MODEL; leave --peer, --bare and --instruction out.")
        _evaluate_aspects(model, choosing, loading, refining, expanding.expander(loading, output), output, as_json=as_json)
    else:
        # The tasks first: a wrong name or file is told before a model of gigabytes is loaded.
        tasks = choosing.tasks()
        expander = expanding.expander(loading, output)
        told, refining = _told(refining, expander, apart=bare or model is None)
        chosen = _peer(str(peer), loading, refining, bare=bare) if model is None else _encoder(model, loading, refining, bare=bare)
        _evaluate(chosen if expander is None else _expanded(chosen, expander, told), tasks, output, as_json=as_json)


def _evaluate(model: Any, tasks: Sequence[Any], output: Path, *, as_json: bool) -> None:
    from genembed.evaluate import run

    scores = run.evaluate(model, tasks, output, show=_tell)
    results, means = str(run.place(model, output)), run.means(scores)
    if as_json:
        print_json({"results": results, "scores": [asdict(score) for score in scores], "means": means})
    else:
        _show(scores, {f"mean, {name}": mean for name, mean in means.items()} if len(scores) > 1 else {})
        typer.echo(f"results: {results}")


def _told(refining: RefineOptions, expander: Expander | None, *, apart: bool) -> tuple[str | None, RefineOptions]:
    """Return the instruction of the language model, and the options without it where it alone is told: beside --bare and --peer."""
    told = None if expander is None else refining.instruction
    return told, replace(refining, instruction=None) if told is not None and apart else refining


def _expanded(model: Any, expander: Expander, told: str | None) -> Any:
    from genembed.evaluate.instructions import Instructions
    from genembed.evaluate.two_stage import expanded

    return expanded(model, expander, Instructions(text=told))


def _encoder(model: str, loading: LoadOptions, refining: RefineOptions, *, bare: bool) -> Any:
    from genembed.evaluate.encoder import Encoder
    from genembed.evaluate.instructions import Instructions

    instructions = Instructions(text=refining.instruction, bare=bare)
    embedder = loading.load(model)
    return Encoder(embedder, halt=refining.rule(embedder.settings), instructions=instructions, truncate=refining.truncate)


def _peer(name: str, loading: LoadOptions, refining: RefineOptions, *, bare: bool) -> Any:
    from genembed.evaluate.peers import load_peer

    same = LoadOptions(device=loading.device, offline=loading.offline)
    if bare or refining != RefineOptions() or loading != same:
        raise ConfigurationError(f"--peer {name}: brings its own prompts and does not refine; of its options only --device has an effect.")
    return load_peer(name, device=None if loading.device == "auto" else loading.device)


def _evaluate_aspects(
    model: str,
    choosing: TaskOptions,
    loading: LoadOptions,
    refining: RefineOptions,
    expander: Expander | None,
    output: Path,
    *,
    as_json: bool,
) -> None:
    from genembed.evaluate.aspects import evaluate_aspects
    from genembed.evaluate.local import parse_aspects

    aspects = parse_aspects(choosing.aspect or ())
    embedder = loading.load(model)
    rule = refining.rule(embedder.settings)
    assert choosing.local is not None
    done = evaluate_aspects(
        embedder, choosing.local[0], aspects, output, halt=rule, truncate=refining.truncate, expander=expander, show=_tell
    )
    if as_json:
        print_json({"scores": [asdict(score) for score in done.scores], "harmonic_mean": done.harmonic_mean})
    else:
        _show(done.scores, {"harmonic mean": done.harmonic_mean})


def _compare(first: Path, second: Path, *, as_json: bool) -> None:
    from genembed.evaluate.significance import compare

    found = compare(first, second)
    if as_json:
        print_json({"first": str(first), "second": str(second), "differences": [asdict(each) for each in found]})
    else:
        _show_differences(found)


def _tell(task: str) -> None:
    """Name the task that begins, on a terminal."""
    if sys.stderr.isatty():
        typer.echo(f"{task} ...", err=True)


def _show(scores: Sequence[Score], summary: dict[str, float]) -> None:
    rows = [
        (
            score.task,
            score.kind,
            score.metric,
            f"{100 * score.score:.2f}",
            "" if score.mean_steps is None else f"{score.mean_steps:.2f}",
            "" if score.texts is None else f"{score.texts:,}",
            "kept" if score.stored else f"{score.seconds:.1f}",
        )
        for score in scores
    ]
    rows += [(name, "", "", f"{100 * value:.2f}", "", "", "") for name, value in summary.items()]
    print_table(("task", "type", "score", "%", "mean k*", "texts", "s"), rows, left=("task", "type", "score"))


def _show_differences(found: Sequence[Difference]) -> None:
    rows = [
        (
            each.task,
            each.metric,
            f"{each.items:,}",
            f"{100 * each.first:.2f}",
            f"{100 * each.second:.2f}",
            f"{100 * (each.second - each.first):+.2f}",
            f"{100 * each.low:+.2f} to {100 * each.high:+.2f}",
            "yes" if each.significant else "no",
        )
        for each in found
    ]
    print_table(("task", "score", "items", "A, %", "B, %", "B - A", "95 %, paired", "differ"), rows, left=("task", "score"))
