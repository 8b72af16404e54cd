"""The figures. Colours are Okabe and Ito's, which the colour-blind can tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from genembed.analyse.intervals import Estimate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_APART = 0.012
"""Distance of points at the same place, as a share of the axis."""
_WIDTH, _HEIGHT, _DPI = 6.4, 3.8, 150


def lines(path: Path, curves: Mapping[str, Sequence[float]], *, first: int, labels: tuple[str, str]) -> None:
    """Draw curves over k = first, first + 1, ... with a logarithmic vertical axis."""
    with _axes(path, labels) as axes:
        for place, (name, values) in enumerate(curves.items()):
            axes.plot(range(first, first + len(values)), values, color=COLOURS[place], marker=_MARKERS[place], markersize=4, label=name)
        axes.set_yscale("log")
        axes.legend(frameon=False)


def band(path: Path, estimates: Sequence[Estimate], *, labels: tuple[str, str]) -> None:
    """Draw estimates at K = 1, 2, ... with their intervals."""
    with _axes(path, labels) as axes:
        _band(axes, estimates, "mean, 95 % interval")
        axes.legend(frameon=False, loc="lower right")


def tradeoff(
    path: Path, curve: Sequence[Estimate], points: Sequence[int], halting: tuple[str, Estimate, Estimate], *, labels: tuple[str, str]
) -> None:
    """Draw quality over fixed K, and the point of a halting rule.

    Args:
        path: File to write.
        curve: Quality at K = 1, 2, ...
        points: The K that are marked.
        halting: Name, mean k* and quality.
        labels: Of the axes.
    """
    name, steps, quality = halting
    with _axes(path, labels) as axes:
        _band(axes, curve, "fixed K, 95 % interval")
        axes.plot(points, [curve[k - 1].value for k in points], "o", color=COLOURS[0], markersize=5)
        error = [[quality.value - quality.low], [quality.high - quality.value]]
        axes.errorbar(
            steps.value, quality.value, yerr=error, fmt="*", color=COLOURS[1], markersize=14, capsize=3, markeredgecolor="white", label=name
        )
        axes.legend(frameon=False, loc="lower right")


def bars(path: Path, shares: Sequence[float], *, labels: tuple[str, str]) -> None:
    """Draw the share of each step."""
    with _axes(path, labels) as axes:
        axes.bar(range(1, len(shares) + 1), shares, color=COLOURS[0], width=0.8)
        axes.set_xlim(0.3, len(shares) + 0.7)


def differences(path: Path, rules: Mapping[str, list[tuple[float, Estimate]]], *, labels: tuple[str, str]) -> None:
    """Draw differences with their intervals over mean steps, one colour for each rule, side by side around their place."""
    places = [at for points in rules.values() for at, _ in points]
    apart = _APART * (max(places) - min(places))
    with _axes(path, labels) as axes:
        axes.axhline(0, color="#666666", linewidth=1)
        for place, (name, points) in enumerate(rules.items()):
            shift = apart * (place - (len(rules) - 1) / 2)
            values = np.asarray([one.value for _, one in points])
            error = [values - [one.low for _, one in points], [one.high for _, one in points] - values]
            colour, form = COLOURS[place % len(COLOURS)], _MARKERS[place % len(_MARKERS)]
            axes.errorbar([at + shift for at, _ in points], values, yerr=error, fmt=form, color=colour, markersize=5, capsize=2, label=name)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))


def _band(axes: Axes, estimates: Sequence[Estimate], label: str) -> None:
    steps = np.arange(1, len(estimates) + 1)
    axes.plot(steps, [one.value for one in estimates], color=COLOURS[0], label=label)
    axes.fill_between(steps, [one.low for one in estimates], [one.high for one in estimates], color=COLOURS[0], alpha=0.18, linewidth=0)


@contextmanager
def _axes(path: Path, labels: tuple[str, str]) -> Iterator[Axes]:
    """Give axes, and write the picture; without pyplot, whose figures are global."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    yield axes
    figure.savefig(path)
