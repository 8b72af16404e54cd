"""From pairs to pairs with hard negatives: `genembed mine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genembed.cli.options import ExcludeOptions, Json, LoadOptions, Model, command
from genembed.cli.output import print_json
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    from genembed.train.pairs import DataFile


@command
def mine(
    paths: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Training pairs without scores: files (jsonl, parquet), folders or hf:NAME.")
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new files, NAME.jsonl for each.")],
    model: Model = "mini",
    negatives: Annotated[int, typer.Option(help="Negatives mined for a row, at most.")] = 4,
    skip: Annotated[int, typer.Option(help="Pass over the nearest so many candidates.")] = 0,
    depth: Annotated[int, typer.Option(help="Take negatives from the nearest so many candidates.")] = 50,
    max_ratio: Annotated[float, typer.Option(help="Leave out candidates whose cosine is above this share of the positive's.")] = 0.95,
    nearest: Annotated[bool, typer.Option("--nearest", help="Take the nearest of what is left, instead of drawing at random.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Leave the rows' own negatives out.")] = False,
    limit: Annotated[int | None, typer.Option(help="Rows of each file, at most, drawn at random.")] = None,
    steps: Annotated[int | None, typer.Option(help="Refine every text exactly this many times; by the model's own rule if not given.")] = (
        None
    ),
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    as_json: Json = False,
    loading: LoadOptions,
    excluding: ExcludeOptions,
) -> None:
    """Add hard negatives to training pairs: texts of the same file that a model finds near to a query."""
    from genembed.train import mine as mining
    from genembed.train.pairs import DataFile

    settings = mining.Mining(
        negatives=negatives,
        skip=skip,
        depth=depth,
        max_ratio=max_ratio,
        nearest=nearest,
        keep_own=not replace,
        limit=limit,
        seed=seed,
    )
    targets = _targets([DataFile(path=path) for path in paths], output)
    for file in targets.values():
        mining.check_unscored(file)
    exclude = excluding.read()
    embed = partial(loading.load(model).encode, steps=steps, show_progress_bar=True)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for target, file in targets.items():
        results.append(mining.mine(file, target, embed, settings, exclude=exclude))
        if not as_json:
            typer.echo(str(results[-1]))
    if as_json:
        print_json({"output": str(output), "files": [asdict(result) for result in results]})


def _targets(files: Sequence[DataFile], output: Path) -> dict[Path, DataFile]:
    """Return the files by what is written for them; refuse to write one twice, or over what is read."""
    targets: dict[Path, DataFile] = {}
    for file in files:
        target = output / f"{file.source.replace('/', '-')}.jsonl"
        if target in targets:
            raise ConfigurationError(f"{targets[target].path} and {file.path} would both be written to {target}; mine them one by one.")
        targets[target] = file
    for target, file in targets.items():
        if any(target.resolve() == Path(read.path).resolve() for read in files):
            raise ConfigurationError(f"-o {output}: {target} would be written over what is read, {file.path}; choose another folder.")
    return targets
