"""What was found, as a report: the paper's tables and figures with their intervals, in its order."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

import genembed
from genembed.analyse import plots, premises
from genembed.analyse.document import Column, Document, Figure, Section, Table
from genembed.analyse.findings import Findings, Settings, grid
from genembed.analyse.intervals import DRAWS, LEVEL, Estimate
from genembed.analyse.rules import numbers_of
from genembed.analyse.splits import EFFECT, SHARE, SPLITS, Result
from genembed.embedder import Embedder
from genembed.testsets import RetrievalSet

PERCENT = 100.0
"""Quality and shares are shown in percent, as in the paper."""

_REFINED = "refinement steps k"


def report(found: Findings, model: Embedder, data: RetrievalSet, settings: Settings) -> Document:
    """Make the report."""
    sections = [_main(found), _tradeoff(found), _patience(found), _depths(found), _premise_one(found), _premise_two(found), _rules(found)]
    if found.documents:
        sections.append(_documents(found))
    if found.seconds:
        sections.append(_seconds(found))
    return Document(f"Refinement of {model.source.name}", _settings(found, model, data, settings), tuple(sections))


def headline(found: Findings) -> Table:
    """Return the main table, which the command line prints as well."""
    name = found.kept.measure
    columns = (
        Column("rule", "rule"),
        Column("chosen", "halting rule chosen on, splits"),
        Column("quality", f"{name}, %"),
        Column("steps", "mean k*"),
        Column("savings", "savings, % of steps", 1),
        Column("to_full", f"less K = {found.kept.steps}, points", signed=True),
        Column("to_budget", "less fixed K = round(mean k*), points", signed=True),
        Column("needed", f"queries to tell {PERCENT * EFFECT:g} points of it"),
    )
    rows = [
        {
            "rule": row.result.name,
            "chosen": row.chosen,
            "quality": row.result.quality.scaled(PERCENT),
            "steps": row.result.steps.value,
            "savings": PERCENT * row.result.savings.value,
            "to_full": row.result.to_full.scaled(PERCENT),
            "to_budget": None if row.to_budget is None else row.to_budget.scaled(PERCENT),
            "needed": row.needed,
        }
        for row in found.main
    ]
    return Table("main", f"Table 1. {name} of the test queries with {_level()} intervals; differences are paired by query.", columns, rows)


def _settings(found: Findings, model: Embedder, data: RetrievalSet, settings: Settings) -> dict[str, Any]:
    return {
        "model": model.source.name,
        "query instruction": (model.settings.query_instruction if settings.instruction is None else settings.instruction) or "none",
        "queries": len(found.kept),
        "documents": len(data.documents),
        "corpus SHA-256": data.fingerprint,
        "K": found.kept.steps,
        "seed": settings.seed,
        "splits": SPLITS,
        "share of queries for development": SHARE,
        "resamples": DRAWS,
        "level of intervals": LEVEL,
        "device": f"{model.backbone.device.type}, {torch.get_num_threads()} threads",
        "genembed": genembed.__version__,
    }


def _main(found: Findings) -> Section:
    text = [
        "A threshold is chosen on the development queries of each split and measured on its test queries; every number is the mean "
        "over the splits. Intervals are a bootstrap over queries, the choice held fixed: they do not cover another draw of the "
        "splits. They are not adjusted for the number of comparisons. Only where an interval of a difference leaves out 0 do these "
        "queries tell the two apart; the last column says how many would find a lead as small as the paper's in four experiments of five."
    ]
    if found.kept.development.ndcg is None:
        text.append(
            "There are no judgements: quality is agreement with the results of the full refinement, which says nothing of how good "
            "they are."
        )
    if not any(row.chosen for row in found.main):
        text.append(f"No split chose a rule that halts. What follows is about {found.halting.name}, which nobody chose.")
    return Section("Main results", tuple(text), (headline(found),))


def _tradeoff(found: Findings) -> Section:
    measure, result = found.kept.measure, found.halting_result
    points = grid(found.kept.steps)
    draw = partial(
        plots.tradeoff,
        curve=[one.scaled(PERCENT) for one in found.curve],
        points=points,
        halting=(result.name, result.steps, result.quality.scaled(PERCENT)),
        labels=("mean refinement steps", f"{measure}, %"),
    )
    every = Table(
        "tradeoff",
        f"Figure 2. {measure} over fixed K, and {result.name} at its mean k*.",
        _CURVE,
        _curve(found, tuple(range(1, found.kept.steps + 1))),
    )
    shown = Table("tradeoff_points", f"{measure} at the paper's fixed K, %.", _CURVE, _curve(found, points))
    distance = Table(
        "distance",
        f"{result.name} less fixed K at the same mean steps, points.",
        (Column("curve", "curve through"), Column("distance", "distance, points", signed=True)),
        [
            {"curve": "K = " + ", ".join(map(str, points)), "distance": found.to_papers_curve.scaled(PERCENT)},
            {"curve": "every K", "distance": result.to_curve.scaled(PERCENT)},
        ],
    )
    text = (
        "The distance is measured on each split and averaged. A curve through few points lies below a concave one, which favours the "
        "rule; the curve through every K is the fair one.",
    )
    return Section("Quality and compute", text, (Figure(every, draw), shown, distance))


_CURVE = (Column("steps", "K"), Column("quality", "quality, %"))


def _curve(found: Findings, points: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"steps": k, "quality": found.curve[k - 1].scaled(PERCENT)} for k in points]


def _patience(found: Findings) -> Section:
    columns = (
        Column("equal", "equal"),
        Column("patience", "M"),
        *_result_columns(found.kept.measure),
        Column("deviation", "standard deviation of k*"),
        Column("to_first", "less M = 1, points", signed=True),
    )
    rows: list[dict[str, Any]] = [
        {
            "equal": row.equal,
            "patience": row.patience,
            **_result(row.result),
            "deviation": row.result.deviation,
            "to_first": None if row.to_first is None else row.to_first.scaled(PERCENT),
        }
        for row in found.patience
    ]
    table = Table("patience", f"Table 2. Patience M of {found.halting.name}.", columns, rows)
    text = (
        "At an equal threshold a larger M does more steps, and what it gains may be the steps alone; at an equal mean k* the "
        "threshold of each M is matched on the test queries, which reads no judgement.",
    )
    return Section("Patience", text, (table,))


def _depths(found: Findings) -> Section:
    shares = [PERCENT * float(share) for share in found.depths]
    table = Table(
        "depths",
        f"Figure 3. Where {found.halting.name} halts: share of the test queries, mean over the splits.",
        (Column("steps", "k*"), Column("share", "share of queries, %")),
        [{"steps": k, "share": share} for k, share in enumerate(shares, start=1)],
    )
    difficulty = Table(
        "difficulty",
        f"k* and difficulty, {found.kept.measure} at step {found.kept.steps} less that at step 1, on each split's test queries: "
        "Spearman's correlation.",
        (
            Column("split", "split"),
            Column("rule", "rule"),
            Column("steps", "mean k*"),
            Column("deviation", "standard deviation"),
            Column("correlation", "correlation", signed=True),
            Column("p_value", "p", 3),
        ),
        [
            {
                "split": row.split,
                "rule": numbers_of(row.rule),
                "steps": row.steps,
                "deviation": row.deviation,
                "correlation": row.correlation,
                "p_value": row.p_value,
            }
            for row in found.splits
        ],
    )
    return Section("Where it halts", (), (Figure(table, partial(plots.bars, shares=shares, labels=("k*", "queries, %"))), difficulty))


def _premise_one(found: Findings) -> Section:
    steps = list(range(2, found.kept.steps + 1))
    curves = {rise.name: rise.remainder.tolist() for rise in found.rises}
    keys = [Column(rise.name, f"1 - s_k, {rise.name}", 8) for rise in found.rises]
    rows = [{"steps": k, **{rise.name: float(rise.remainder[k - 2]) for rise in found.rises}} for k in steps]
    figure = Table(
        "premise1",
        "1 - s_k, median over queries: the model, the same states in random order, and random states.",
        (Column("steps", "k"), *keys),
        rows,
    )
    summary = Table(
        "premise1_correlation",
        "Premise 1. Spearman's correlation of k and s_k for each query.",
        (
            Column("states", "states"),
            Column("median", "median", 3),
            Column("low", "10 % quantile", 3),
            Column("perfect", "queries with correlation 1, %", 1),
        ),
        [
            {
                "states": rise.name,
                "median": float(np.nanmedian(rise.correlation)),
                "low": float(np.nanquantile(rise.correlation, 0.1)),
                "perfect": PERCENT * float(np.mean(rise.correlation > 1 - 1e-9)),
            }
            for rise in found.rises
        ],
    )
    text = (
        "Of a running mean, step k moves 1/k: s_k rises even where the states are random. Permuted: each query's own states in "
        "random order. Random: states of the same length and the same component along their mean, otherwise in random directions. "
        f"Both {premises.DRAWS} times for each query. What they reach is averaging; only what lies beyond them is the model's.",
    )
    return Section(
        "Premise 1: embeddings converge",
        text,
        (summary, Figure(figure, partial(plots.lines, curves=curves, first=2, labels=(_REFINED, "1 - s_k")))),
    )


def _premise_two(found: Findings) -> Section:
    says, last = found.agreement, found.kept.steps
    columns = (
        Column("steps", "k"),
        Column("jaccard", "Jaccard@10, %"),
        Column("across", "Spearman over queries of s_k and Jaccard@10", signed=True),
    )
    rows: list[dict[str, Any]] = [
        {"steps": k, "jaccard": one.scaled(PERCENT), "across": float(says.across[k - 2]) if 2 <= k < last else None}
        for k, one in enumerate(says.jaccard, start=1)
    ]
    figure = Table("premise2", f"Jaccard@10 of the results at step k with those at step {last}.", columns, rows)
    points = grid(last)
    shown = Table("premise2_points", figure.caption, columns, [rows[k - 1] for k in points])
    pairs = {
        "over steps, for each query: s_k and Jaccard@10 with the last step": says.within,
        "over steps, for each query: s_k and Jaccard@10 with the step before": says.change,
        "over queries, at each step: s_k and Jaccard@10 with the last step": says.across,
    }
    summary = Table(
        "premise2_correlation",
        "Premise 2. Spearman's correlation; where one of the two is constant there is none.",
        (Column("of", "correlation"), Column("median", "median", 3, signed=True), Column("defined", "defined in, %", 1)),
        [{"of": name, "median": _median(values), "defined": PERCENT * float(np.mean(~np.isnan(values)))} for name, values in pairs.items()],
    )
    text = (
        "Over steps, s_k and the agreement both rise whatever the model does, so that their correlation for a query says little. "
        "What a halting rule needs is the correlation over queries at one step: does s_k tell which queries may stop?",
    )
    draw = partial(plots.band, estimates=[one.scaled(PERCENT) for one in says.jaccard], labels=(_REFINED, f"Jaccard@10 with k = {last}, %"))
    return Section("Premise 2: stability tells of the ranking", text, (summary, Figure(figure, draw), shown))


def _rules(found: Findings) -> Section:
    columns = (
        Column("target", "target", 0),
        Column("family", "rule"),
        Column("rule", "with"),
        *_result_columns(found.kept.measure),
        Column("jaccard", "Jaccard@10, %"),
        Column("to_converge_stop", "less ConvergeStop, points", signed=True),
    )
    rows: list[dict[str, Any]] = [
        {
            "target": row.target,
            "family": row.family,
            "rule": numbers_of(row.rule),
            **_result(row.result),
            "jaccard": row.jaccard.scaled(PERCENT),
            "to_converge_stop": None if row.to_converge_stop is None else row.to_converge_stop.scaled(PERCENT),
        }
        for row in found.rules
    ]
    points: dict[str, list[tuple[float, Estimate]]] = {}
    for row in found.rules:
        points.setdefault(row.family, []).append((row.result.steps.value, row.result.to_curve.scaled(PERCENT)))
    labels = ("mean k*", f"{found.kept.measure} less fixed K, points")
    figure = Table(
        "rules_figure", "Every rule less fixed K at the same mean steps. Points are set apart sideways to be seen.", columns, rows
    )
    table = Table("rules", "Rules at equal mean steps, on all queries.", columns, rows)
    text = (
        "The number of each rule is matched to the target, the mean steps, on all queries, which reads no judgement. Rank stability "
        "has whole numbers alone and may miss it; it is not compared with ConvergeStop where their costs differ. The oracle knows the "
        "results at the end. Margin and remaining movement rest on an estimate of what is still to come, so neither is a guarantee.",
    )
    return Section("Other rules at the same cost", text, (Figure(figure, partial(plots.differences, rules=points, labels=labels)), table))


def _documents(found: Findings) -> Section:
    columns = (
        Column("queries", "queries"),
        Column("documents", "documents"),
        Column("query_steps", "mean k*, queries"),
        Column("document_steps", "mean k*, documents"),
        Column("quality", f"{found.kept.measure}, %"),
        Column("to_full", "less refining everything to the end, points", signed=True),
    )
    rows: list[dict[str, Any]] = [
        {
            "queries": row.queries,
            "documents": row.documents,
            "query_steps": row.query_steps,
            "document_steps": row.document_steps,
            "quality": row.quality.scaled(PERCENT),
            "to_full": row.to_full.scaled(PERCENT),
        }
        for row in found.documents
    ]
    text = (
        "The rule that was chosen for the queries halts the documents too; no documents were developed on. Everywhere else documents "
        "are refined to the end.",
    )
    return Section("Halting documents", text, (Table("documents", f"{found.halting.name} on queries, documents, or both.", columns, rows),))


def _seconds(found: Findings) -> Section:
    columns = (
        Column("role", "texts"),
        Column("texts", "number"),
        Column("full", f"K = {found.kept.steps}, s"),
        Column("spread", "its spread, s"),
        Column("halted", "halted, s"),
        Column("prefill", "prompts, s"),
        Column("step", "one step, s", 3),
        Column("steps", "mean k*"),
        Column("iteration_saving", "steps saved, %", 1),
        Column("ceiling", "ceiling, %", 1),
        Column("saving", "seconds saved, %", 1),
    )
    rows: list[dict[str, Any]] = [
        {
            "role": role,
            "texts": one.texts,
            "full": one.full,
            "spread": one.spread,
            "halted": one.halted,
            "prefill": one.prefill,
            "step": one.step,
            "steps": one.steps,
            "iteration_saving": PERCENT * one.iteration_saving,
            "ceiling": PERCENT * one.ceiling,
            "saving": PERCENT * one.saving,
        }
        for role, one in found.seconds.items()
    ]
    text = (
        "All texts are refined to the end, under the rule and for one step, in turns in one process; medians. Prompts are read "
        "whatever the rule does, so the ceiling is 1 - (prompts + k* step) / (prompts + K step).",
    )
    return Section("Seconds", text, (Table("seconds", f"End to end, {found.timed}.", columns, rows),))


def _result_columns(measure: str) -> tuple[Column, ...]:
    return (
        Column("steps", "mean k*"),
        Column("quality", f"{measure}, %"),
        Column("to_curve", "less fixed K at the same mean, points", signed=True),
    )


def _result(result: Result) -> dict[str, Any]:
    return {"steps": result.steps.value, "quality": result.quality.scaled(PERCENT), "to_curve": result.to_curve.scaled(PERCENT)}


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if not np.isnan(values).all() else float("nan")


def _level() -> str:
    return f"{LEVEL:.0%}".replace("%", " %")
