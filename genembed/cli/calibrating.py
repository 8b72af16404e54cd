"""When to stop: `genembed calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genembed.cli.options import Json, LoadOptions, command
from genembed.cli.output import print_json
from genembed.errors import ConfigurationError

_WIDTH = 100
"""Of the table where no terminal says how wide it is."""

if TYPE_CHECKING:
    from genembed.calibrate.choose import Choice
    from genembed.calibrate.development import Development


@command
def calibrate(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or hub id.")],
    *,
    corpus: Annotated[Path, typer.Option(help="Documents: .jsonl[.gz] with _id, text and perhaps title.")],
    queries: Annotated[Path, typer.Option(help="Development queries: .jsonl[.gz] with _id and text.")],
    qrels: Annotated[Path | None, typer.Option(help="Judgements: BEIR's .tsv or TREC's four columns.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for rule and certificate; into the model's own folder if not given.")
    ] = None,
    rule: Annotated[
        Literal["certified", "percentile"], typer.Option(help="Certify a bound on the loss, or choose a percentile as the paper does.")
    ] = "certified",
    loss: Annotated[
        Literal["ndcg", "jaccard"] | None, typer.Option(help="Loss that is certified; ndcg with judgements, jaccard without.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Loss that is accepted, 0.02 for two points; 0.02 (ndcg), 0.05 (jaccard), 0.005 (percentile).")
    ] = None,
    delta: Annotated[float, typer.Option(help="Chance that a certified bound does not hold.")] = 0.1,
    patience: Annotated[list[int] | None, typer.Option(help="Stable steps in a row, M; several share delta. 2 if not given.")] = None,
    min_steps: Annotated[int, typer.Option(help="No text halts before this step.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Steps of the full refinement; those of the model's rule if not given.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Instruction of the queries; the model's own one if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which queries are read.")] = 0,
    as_json: Json = False,
    loading: LoadOptions,
) -> None:
    """Choose the halting rule on development queries, and say how sure that is."""
    from genembed.calibrate import certificate
    from genembed.calibrate.development import develop
    from genembed.testsets import read_retrieval_set

    patiences = tuple(patience or (2,))
    if rule == "percentile" and (len(patiences) > 1 or loss is not None):
        raise ConfigurationError("--rule percentile has one --patience and no --loss; leave the others out.")
    data = read_retrieval_set(corpus, queries, qrels)
    if loss == "ndcg" and data.relevant is None:
        raise ConfigurationError("--loss ndcg needs judgements: give --qrels, or use --loss jaccard.")
    embedder = loading.load(model)
    folder = certificate.settings_folder(embedder.source) if output is None else None
    development = develop(embedder, data, instruction=instruction, max_steps=max_steps, show_progress_bar=True)
    method: dict[str, Any] = {"rule": rule, "patiences": list(patiences), "min_steps": min_steps, "max_steps": development.max_steps}
    if rule == "certified":
        chosen_loss = loss or ("jaccard" if data.relevant is None else "ndcg")
        bound = (0.05 if chosen_loss == "jaccard" else 0.02) if epsilon is None else epsilon
        method |= {"loss": chosen_loss, "epsilon": bound, "delta": delta, "seed": seed}
    else:
        method |= {"epsilon": 0.005 if epsilon is None else epsilon}
    choice = _choice(development, method)
    value = certificate.record(choice, embedder, data, instruction=instruction, method=method)
    if output is not None:
        certificate.write_record(output, value)
    elif folder is not None:
        certificate.write_into_model(folder, value)
    written = str(output if output is not None else folder)
    if as_json:
        print_json({"written": written, **value})
    else:
        _show(choice, development, written)


def _choice(development: Development, method: dict[str, Any]) -> Choice:
    from genembed.calibrate.choose import by_certificate, by_percentile

    if method["rule"] == "percentile":
        return by_percentile(development, epsilon=method["epsilon"], patience=method["patiences"][0], min_steps=method["min_steps"])
    return by_certificate(
        development,
        loss=method["loss"],
        epsilon=method["epsilon"],
        delta=method["delta"],
        patiences=method["patiences"],
        min_steps=method["min_steps"],
        seed=method["seed"],
    )


def _show(choice: Choice, development: Development, written: str) -> None:
    """Print the candidates as one table, then what was decided."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1), title=f"{len(development)} queries, K = {development.max_steps}", title_justify="left"
    )
    for heading in ("1 - tau", "from", "mean k*", "nDCG@10", "Jaccard@10", "fixed K", "its nDCG", "decision"):
        table.add_column(heading, justify="left" if heading in ("from", "decision") else "right", no_wrap=True)
    full = None if development.ndcg is None else float(development.ndcg[:, -1].mean())
    table.add_row(
        "", "no halting", f"{development.max_steps:.2f}", _percent(full), "100.00", str(development.max_steps), _percent(full), ""
    )
    for one in choice.candidates:
        table.add_row(
            f"{1 - one.rule.threshold:.2g}",
            one.source,
            f"{one.mean_steps:.2f}",
            _percent(one.quality),
            _percent(one.agreement),
            str(one.budget),
            _percent(one.budget_quality),
            one.decision,
        )
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH).print(table)
    typer.echo(f"{choice.rule}: {choice.reason}")
    typer.echo(f"written: {written}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
