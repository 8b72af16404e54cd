"""From a recipe to a model: `genembed train`."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genembed.cli.options import ExcludeOptions, Json, command
from genembed.cli.output import print_result
from genembed.errors import missing_extra

if TYPE_CHECKING:
    from genembed.train.recipe import Recipe

_MERGED = "merged"
_SCORE = "eval_"
_EXTRA = ("accelerate", "matplotlib")
"""What every run needs of the extra; looked for before the run, as the curves are only drawn when it has trained."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What is changed in a recipe."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="PATH[=WEIGHT]", help="Training pairs: file (jsonl, parquet), folder or hf:NAME, and its share in the mix."
        ),
    ] = None
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to start from, instead of the recipe's own: folder or hub id.")
    ] = None
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as objective.temperature=0.05; values are JSON."),
    ] = None

    def read(self, recipe: str, *, fsdp: bool = False) -> Recipe:
        """Return the recipe of this name or file with what is changed."""
        from genembed.cli.overrides import overridden
        from genembed.cli.recipe_files import chosen_recipe, data_file

        model = [] if self.model is None else [f"model={json.dumps(self.model)}"]
        assignments = [*model, *(["fsdp=true"] if fsdp else []), *(self.assignments or ())]
        return overridden(chosen_recipe(recipe, [data_file(path) for path in self.data or ()]), assignments)


@command
def train(
    *,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="One of ours by name, or a function of your own file: FILE.py:FUNCTION.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run and of the model.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad row instead of counting it.")] = False,
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp", help="Cut all weights into parts over the processes; the same as --set fsdp=true. See docs/training.md."),
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help=f"Also write full weights, to OUTPUT/{_MERGED}.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe as JSON, and do nothing.")] = False,
    as_json: Json = False,
    changing: RecipeOptions,
    excluding: ExcludeOptions,
) -> None:
    """Train a model; the output is a folder that every other command takes with -m.

    Several devices: torchrun --nproc-per-node 4 -m genembed.cli train ...
    """
    _check_extra()
    chosen = changing.read(recipe, fsdp=fsdp)
    if dry_run:
        _show_recipe(chosen, as_json=as_json)
        return
    from genembed.train import merge as merging
    from genembed.train.gather import leave_group
    from genembed.train.run import train as run

    if merge:
        merging.check_mergeable(chosen)
    begin = time.perf_counter()
    model = run(chosen, output, resume=resume, strict=strict, exclude=excluding.read())
    seconds = time.perf_counter() - begin
    leave_group()
    if not _is_first_process():
        return
    if merge:
        merging.merge(model, output / _MERGED, chosen.served or model.settings)
    _report(chosen, output, seconds, merged=merge, as_json=as_json)


def _check_extra() -> None:
    for package in _EXTRA:
        if find_spec(package) is None:
            raise missing_extra("train", package)


def _show_recipe(recipe: Recipe, *, as_json: bool) -> None:
    from genembed.train.run import recipe_json

    value = recipe_json(recipe)
    print_result(value, json.dumps(value, indent=2, ensure_ascii=False), as_json=as_json)


def _is_first_process() -> bool:
    """Whether this process reports: a launcher starts one for each device, and numbers them."""
    return os.environ.get("RANK", "0") == "0"


def _report(recipe: Recipe, output: Path, seconds: float, *, merged: bool, as_json: bool) -> None:
    history = _history(output)
    updates, (update, scores) = max(history), _scores(history, _kept_update(recipe, output))
    summary = {
        "output": str(output),
        "merged": str(output / _MERGED) if merged else None,
        "model": recipe.model,
        "updates": updates,
        "seconds": seconds,
        "scored_update": update,
        "scores": scores,
    }
    lines = [f"{output}: {recipe.model} trained for {updates} updates, {seconds:.1f} s"]
    if merged:
        lines.append(f"{output / _MERGED}: the same model in full weights")
    if scores:
        lines.append(f"held-out pairs at update {update}: {', '.join(f'{name} {value:.2f}' for name, value in scores.items())}")
    print_result(summary, "\n".join(lines), as_json=as_json)


def _history(output: Path) -> dict[int, dict[str, str]]:
    """Return a run's history by update."""
    from genembed.train.callbacks import HISTORY

    with (output / HISTORY).open(newline="", encoding="utf-8") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def _kept_update(recipe: Recipe, output: Path) -> int | None:
    """Return the update whose weights were kept as the best; None if those of the last one are."""
    from genembed.train.callbacks import BEST

    if recipe.evaluation is None or not recipe.evaluation.patience:
        return None
    step: int = json.loads((output / BEST / "score.json").read_text(encoding="utf-8"))["step"]
    return step


def _scores(history: Mapping[int, Mapping[str, str]], update: int | None) -> tuple[int | None, dict[str, float]]:
    """Return the held-out scores of an update, of the last one that has any if None, after its number."""
    measured = {
        step: {name.removeprefix(_SCORE): float(value) for name, value in row.items() if name.startswith(_SCORE) and value}
        for step, row in history.items()
    }
    if update is None:
        update = max((step for step, scores in measured.items() if scores), default=None)
    return update, {} if update is None else measured[update]
