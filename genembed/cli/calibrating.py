"""When to stop: `genembed calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genembed.cli.options import Json, LoadOptions, command
from genembed.cli.output import print_json, print_table
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genembed.calibrate.choose import Choice
    from genembed.calibrate.development import Development

_EPSILON = {"ndcg": 0.02, "jaccard": 0.05, "percentile": 0.005}
"""Loss that is accepted where none is given."""


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """How the rule is chosen."""

    rule: Annotated[
        Literal["certified", "percentile"], typer.Option(help="Certify a bound on the loss, or choose a percentile as the paper does.")
    ] = "certified"
    loss: Annotated[
        Literal["ndcg", "jaccard"] | None, typer.Option(help="Loss that is certified; ndcg with judgements, jaccard without.")
    ] = None
    epsilon: Annotated[
        float | None, typer.Option(help="Loss that is accepted, 0.02 for two points; 0.02 (ndcg), 0.05 (jaccard), 0.005 (percentile).")
    ] = None
    delta: Annotated[float, typer.Option(help="Chance that a certified bound does not hold.")] = 0.1
    patience: Annotated[list[int] | None, typer.Option(help="Stable steps in a row, M; several share delta. 2 if not given.")] = None
    min_steps: Annotated[int, typer.Option(help="No text halts before this step.")] = 1
    seed: Annotated[int, typer.Option(help="Of the order in which queries are read.")] = 0

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if self.rule == "percentile" and (len(self.patience or ()) > 1 or self.loss is not None):
            raise ConfigurationError("--rule percentile has one --patience and no --loss; leave the others out.")

    def method(self, *, judged: bool, max_steps: int) -> dict[str, Any]:
        """Return what the record says of the method: the options, with the values of those that were not given.

        Args:
            judged: Whether there are judgements.
            max_steps: Steps of the full refinement.
        """
        shared = {"rule": self.rule, "patiences": list(self.patience or (2,)), "min_steps": self.min_steps, "max_steps": max_steps}
        if self.rule == "percentile":
            return {**shared, "epsilon": self._accepted("percentile")}
        loss = self.loss or ("ndcg" if judged else "jaccard")
        return {**shared, "loss": loss, "epsilon": self._accepted(loss), "delta": self.delta, "seed": self.seed}

    def _accepted(self, name: str) -> float:
        return _EPSILON[name] if self.epsilon is None else self.epsilon


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
    max_steps: Annotated[int | None, typer.Option(help="Steps of the full refinement; those of the model's rule if not given.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Instruction of the queries; the model's own one if not given.")] = None,
    as_json: Json = False,
    choosing: RuleOptions,
    loading: LoadOptions,
) -> None:
    """Choose the halting rule on development queries, and say how sure that is."""
    from genembed.calibrate import certificate
    from genembed.calibrate.development import develop
    from genembed.testsets import read_retrieval_set

    data = read_retrieval_set(corpus, queries, qrels)
    if choosing.loss == "ndcg" and data.relevant is None:
        raise ConfigurationError("--loss ndcg needs judgements: give --qrels, or use --loss jaccard.")
    embedder = loading.load(model)
    target = output or certificate.settings_folder(embedder.source)  # asked for before the work: it may be refused
    development = develop(embedder, data, instruction=instruction, max_steps=max_steps, show_progress_bar=True)
    method = choosing.method(judged=data.relevant is not None, max_steps=development.max_steps)
    choice = _choice(development, method)
    value = certificate.record(choice, embedder, data, instruction=instruction, method=method)
    (certificate.write_into_model if output is None else certificate.write_record)(target, value)
    if as_json:
        print_json({"written": str(target), **value})
    else:
        _show(choice, development)
        typer.echo(f"written: {target}")


def _choice(development: Development, method: Mapping[str, Any]) -> Choice:
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


def _show(choice: Choice, development: Development) -> None:
    """Print the candidates as one table, then what was decided."""
    full = None if development.ndcg is None else float(development.ndcg[:, -1].mean())
    steps = development.max_steps
    rows = [("", "no halting", f"{steps:.2f}", _percent(full), "100.00", str(steps), _percent(full), "")]
    rows += [
        (
            f"{1 - one.rule.threshold:.2g}",
            one.source,
            f"{one.mean_steps:.2f}",
            _percent(one.quality),
            _percent(one.agreement),
            str(one.budget),
            _percent(one.budget_quality),
            one.decision,
        )
        for one in choice.candidates
    ]
    headings = ("1 - tau", "from", "mean k*", "nDCG@10", "Jaccard@10", "fixed K", "its nDCG", "decision")
    print_table(headings, rows, left=("from", "decision"), title=f"{len(development)} queries, K = {steps}")
    typer.echo(f"{choice.rule}: {choice.reason}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
