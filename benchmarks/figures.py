"""The figures of docs/reproduction.md, from the result files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from halting_verdicts import Measured
from matplotlib.figure import Figure
from verdicts import BASELINES, MOST_STEPS, ROWS, TRAINED_STEPS, UNTRAINED, Results, Run

ENDINGS = {"-quarter": 0.25, "-half": 0.5, "": 1.0}
"""Ending of an experiment's name, and its share of the data, smallest first."""

_SEED_ALPHA = 0.35


def test_time_scaling(results: Results) -> Figure:
    """Draw quality over K: trained to generate above, made to generate anyway below (GIRCSE, figure 2)."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = (
        ("trained to generate, to K = 1", ROWS, 1),
        ("made to generate, to K = 0", (*BASELINES[results.backbone], *_untrained(results)), 0),
    )
    for place, (title, names, base) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place, title=title, xlabel="K", ylabel="points, mean of sets")
        for name in names:
            _draw_steps(axes, results.by_name.get(name, ()), name, base)
        axes.set_xticks(range(0, MOST_STEPS + 1, 5))
        axes.axhline(0, color="black", linewidth=0.6)
        if place == 1:
            axes.axvspan(TRAINED_STEPS, MOST_STEPS, color="black", alpha=0.06)
        _finish(axes)
    return figure


def _untrained(results: Results) -> tuple[str, ...]:
    return UNTRAINED[results.backbone]


def _draw_steps(axes: Any, runs: Sequence[Run], name: str, base: int) -> None:
    """Draw the mean over seeds, and each seed faintly."""
    ks = np.arange(base, MOST_STEPS + 1)
    curves = [np.mean([scores[base:] for scores in run["scores"].values()], axis=0) for run in runs]
    if not curves:
        return
    (line,) = axes.plot(ks, np.mean(curves, axis=0) - np.mean(curves, axis=0)[0], label=name)
    for curve in curves if len(curves) > 1 else []:
        axes.plot(ks, curve - curve[0], color=line.get_color(), alpha=_SEED_ALPHA, linewidth=0.7)


def data_scaling(results: Results) -> Figure:
    """Draw quality over the number of training pairs (GIRCSE, figure 3)."""
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.add_subplot(1, 1, 1, xlabel="training pairs", ylabel="mean of sets")
    shown = [("gircse", MOST_STEPS), ("gircse", TRAINED_STEPS), *((name, 0) for name in BASELINES[results.backbone])]
    for name, k in shown:
        sizes = [results.by_name[f"{name}{ending}"] for ending in ENDINGS if f"{name}{ending}" in results.by_name]
        if not sizes:
            continue
        means = [[_mean(run, k) for run in runs] for runs in sizes]
        pairs = [pairs_of(runs[0]) for runs in sizes]
        label = f"{name}, K = {k}"
        axes.errorbar(pairs, [np.mean(own) for own in means], [np.std(own) for own in means], label=label, marker="o", capsize=3)
    _finish(axes)
    return figure


def training_curves(results: Results) -> Figure:
    """Draw loss and gradient norm of every seed (GIRCSE, figures 4 and 5)."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    for place, (title, column) in enumerate((("loss", "loss"), ("gradient norm", "grad_norm")), start=1):
        axes = figure.add_subplot(1, 2, place, title=title, xlabel="update")
        for run in results.by_name.get("gircse", ()):
            axes.plot(run["curves"]["step"], run["curves"][column], label=f"seed {run['seed']}", linewidth=1.0)
        _finish(axes)
    return figure


def halting_tradeoff(measured: Measured) -> Figure:
    """Draw quality over fixed K, and where the halting rule lies, set by set (ConvergeStop, figure 2)."""
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    for place, one in enumerate(measured.sets, start=1):
        axes = figure.add_subplot(2, 2, place, title=f"{one.name}, {one.queries} queries", xlabel="mean steps", ylabel="nDCG@10, %")
        curve = {row["steps"]: row["quality"] for row in one.table("tradeoff")}
        axes.plot(list(curve), [row["value"] for row in curve.values()], label="fixed K", color="#0072B2")
        points = [k for k in (1, 3, 5, 10, 15, 20) if k in curve]
        axes.plot(points, [curve[k]["value"] for k in points], "o", color="#0072B2")
        for row in one.table("main"):
            if row["chosen"]:
                axes.plot(row["steps"], row["quality"]["value"], "*", markersize=13, color="#D55E00", label=row["rule"])
        _finish(axes)
    return figure


def halting_depths(measured: Measured) -> Figure:
    """Draw where the test queries halt, set by set (ConvergeStop, figure 3)."""
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    for place, one in enumerate(measured.sets, start=1):
        axes = figure.add_subplot(2, 2, place, title=one.name, xlabel="k*", ylabel="test queries, %")
        rows = one.table("depths")
        axes.bar([row["steps"] for row in rows], [row["share"] for row in rows], color="#0072B2")
        axes.set_xticks(range(0, len(rows) + 1, 5))
        _finish(axes)
    return figure


HALTING_FIGURES: Mapping[str, Callable[[Measured], Figure]] = {"tradeoff": halting_tradeoff, "depths": halting_depths}

FIGURES: Mapping[str, Callable[[Results], Figure]] = {
    "steps": test_time_scaling,
    "data": data_scaling,
    "curves": training_curves,
}


def pairs_of(run: Run) -> int:
    """Return how many pairs a run was trained on; none came twice."""
    return int(run["training"]["queries"] * run["training"]["updates"])


def _mean(run: Run, steps: int) -> float:
    return float(np.mean([scores[steps] for scores in run["scores"].values()]))


def _finish(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def fingerprint(results: Results) -> str:
    """Return a hash of what is drawn, which a picture carries so that a stale one can be told."""
    drawn = {name: [[run["seed"], run["scores"], run["curves"]] for run in runs] for name, runs in sorted(results.by_name.items())}
    return _hash(drawn)


def halting_fingerprint(measured: Measured) -> str:
    """Return the same of the sets on which halting was measured."""
    return _hash([[one.name, one.table("main"), one.table("tradeoff"), one.table("depths")] for one in measured.sets])


def _hash(drawn: object) -> str:
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def save(figure: Figure, path: Path, mark: str) -> None:
    """Write a picture with its mark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Description": mark})


def mark_of(path: Path) -> str | None:
    """Return the mark of a picture; None if there is no picture."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return str(image.info.get("Description"))
