"""What the result files of docs/reproduction.md say about the papers' claims, by rules that are written here and nowhere else.

A comparison is the mean over sets of paired differences: the same texts, the same seeds. Its interval is the 95 % percentile
interval of a bootstrap that draws seeds and sets anew, both at once, so that it speaks of other seeds and of other sets. A claim
holds if each of its comparisons has its interval on the claimed side, in part if some have; if none has, it does not hold where one
has it on the other side, and is not decided where all lie across the border.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

MOST_STEPS, TRAINED_STEPS = 20, 5
"""K at which the paper measures GIRCSE, and K of its training."""
LEAST_SEEDS = 3
NO_GAIN = 0.5
"""Points: a baseline does not gain if its interval ends below this."""
SPIKE = 5.0
"""A gradient norm after the warm-up that is so many times the run's median is a spike."""
WARM_UP, FIFTH = 0.1, 0.2

BASELINES = {"decoder": ("causal-eos", "bidirectional-avg"), "mini": ("bidirectional-avg", "last-token")}
"""One-pass models; the first is the row `none` of the paper's table 3."""
UNTRAINED = {"decoder": ("untrained", "eos-stage"), "mini": ("untrained",)}
"""Models that were never trained to generate."""
ROWS = ("gen", "gen-sl", "gircse")
"""The other rows of table 3."""

_DRAWS = 10_000

Run = Mapping[str, Any]
"""A result file."""


class NotRunError(Exception):
    """A result that a rule needs is not there."""


@dataclass(frozen=True)
class Interval:
    """A difference in points, with the interval that holds it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Show it as every table does."""
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


@dataclass(frozen=True)
class Comparison:
    """One of the things that a claim says."""

    what: str
    interval: Interval
    state: Literal["yes", "no", "open"]
    """Whether the interval lies on the claimed side, on the other one, or across the border."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a claim on one backbone."""

    claim: str
    word: str
    """`holds`, `holds in part`, `does not hold`, `not decided` or `not run`."""
    comparisons: tuple[Comparison, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Results:
    """The result files of one backbone."""

    backbone: str
    by_name: Mapping[str, Sequence[Run]]

    @classmethod
    def of(cls, backbone: str, runs: Iterable[Run]) -> Results:
        """Sort the runs of a backbone by name and seed."""
        by_name: dict[str, list[Run]] = {}
        for run in sorted(runs, key=lambda run: run["seed"]):
            if run["backbone"] == backbone:
                by_name.setdefault(run["name"], []).append(run)
        return cls(backbone, by_name)

    def runs(self, name: str, *, least: int = LEAST_SEEDS) -> Sequence[Run]:
        """Return the runs of an experiment.

        Raises:
            NotRunError: If there are fewer than `least`.
        """
        found = self.by_name.get(name, ())
        if len(found) < least:
            raise NotRunError(f"{self.backbone}-{name}: {len(found)} of {least} seeds")
        return found

    def quality(self, name: str, steps: int, *, least: int = LEAST_SEEDS) -> np.ndarray:
        """Return the scores of an experiment at one K: [seeds, sets]."""
        return np.asarray([[scores[steps] for scores in run["scores"].values()] for run in self.runs(name, least=least)], dtype=float)


def read_results(folder: Path) -> list[Run]:
    """Read all result files of a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]


def interval(differences: np.ndarray) -> Interval:
    """Return the mean of differences [seeds, sets] and its bootstrap interval."""
    rng, (seeds, sets) = np.random.default_rng(0), differences.shape
    rows, columns = rng.integers(seeds, size=(_DRAWS, seeds)), rng.integers(sets, size=(_DRAWS, sets))
    means = differences[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(differences.mean()), float(low), float(high))


def above(what: str, differences: np.ndarray) -> Comparison:
    """Claim a gain."""
    found = interval(differences)
    return Comparison(what, found, "yes" if found.low > 0 else "no" if found.high < 0 else "open")


def below(what: str, differences: np.ndarray, *, border: float = 0.0) -> Comparison:
    """Claim a loss; or, of a border above 0, no gain as large."""
    found = interval(differences)
    return Comparison(what, found, "yes" if found.high < border else "no" if found.low > border else "open")


def judged(claim: str, comparisons: Sequence[Comparison], *, note: str = "") -> Verdict:
    """Return the verdict that follows from comparisons."""
    states = {one.state for one in comparisons}
    word = "holds" if states == {"yes"} else "holds in part" if "yes" in states else "does not hold" if "no" in states else "not decided"
    return Verdict(claim, word, tuple(comparisons), note)


def naive_generation_degrades(results: Results) -> Verdict:
    """G1: K = 20 is below K = 0 for every model that was never trained to generate."""
    comparisons = []
    for name in UNTRAINED[results.backbone]:
        gain = results.quality(name, MOST_STEPS, least=1) - results.quality(name, 0, least=1)
        comparisons.append(below(f"{name}, K = {MOST_STEPS} to K = 0", gain))
    return judged("G1", comparisons, note="one model each: the interval is over sets alone")


def beats_baselines(results: Results) -> Verdict:
    """G2: GIRCSE is above every one-pass baseline, at the trained and at the largest K."""
    comparisons = [
        above(f"GIRCSE at K = {k} to {name}", results.quality("gircse", k) - results.quality(name, 0))
        for name in BASELINES[results.backbone]
        for k in (TRAINED_STEPS, MOST_STEPS)
    ]
    note = "an encoder cannot be read causally: Causal-EOS is not testable here" if results.backbone == "mini" else ""
    return judged("G2", comparisons, note=note)


def every_part_helps(results: Results) -> Verdict:
    """G3: each row of table 3 is above the row before, at the trained and at the largest K."""
    names, comparisons = (BASELINES[results.backbone][0], *ROWS), []
    for before, name in zip(names, ROWS, strict=False):
        for k in (TRAINED_STEPS, MOST_STEPS):
            base = results.quality(before, k if before in ROWS else 0)
            comparisons.append(above(f"{name} to {before}, K = {k}", results.quality(name, k) - base))
    return judged("G3", comparisons)


def rises_with_steps(results: Results) -> Verdict:
    """G4: quality rises up to the trained K, and beyond it."""
    at = {k: results.quality("gircse", k) for k in (1, TRAINED_STEPS, MOST_STEPS)}
    return judged(
        "G4",
        [
            above(f"K = {TRAINED_STEPS} to K = 1", at[TRAINED_STEPS] - at[1]),
            above(f"K = {MOST_STEPS} to K = {TRAINED_STEPS}", at[MOST_STEPS] - at[TRAINED_STEPS]),
        ],
    )


def baselines_do_not_gain(results: Results) -> Verdict:
    """G5: the trained baselines do not gain from generating anyway."""
    names = BASELINES[results.backbone]
    gains = {name: results.quality(name, MOST_STEPS) - results.quality(name, 0) for name in names}
    return judged("G5", [below(f"{name}, K = {MOST_STEPS} to K = 0", gain, border=NO_GAIN) for name, gain in gains.items()])


def training_is_stable(results: Results) -> Verdict:
    """G7: in every run the loss of the last fifth is below that of the first, and no gradient norm is a spike."""
    runs = results.runs("gircse")
    falls, calm = zip(*((_fall(run), _largest(run)) for run in runs), strict=True)
    loss = Interval(float(np.mean(falls)), min(falls), max(falls))
    norm = Interval(float(np.mean(calm)), min(calm), max(calm))
    return judged(
        "G7",
        [
            Comparison("loss, last fifth less first", loss, "yes" if loss.high < 0 else "no"),
            Comparison("largest gradient norm, in medians", norm, "yes" if norm.high <= SPIKE else "no"),
        ],
        note="in brackets the smallest and the largest of the seeds",
    )


def _fall(run: Run) -> float:
    loss = np.asarray(run["curves"]["loss"])
    part = max(1, round(FIFTH * len(loss)))
    return float(loss[-part:].mean() - loss[:part].mean())


def _largest(run: Run) -> float:
    norms = np.asarray(run["curves"]["grad_norm"])
    return float(norms[round(WARM_UP * len(norms)) :].max() / np.median(norms))


def gap_is_larger_with_less_data(results: Results) -> Verdict:
    """G10: GIRCSE's lead at a quarter of the data is above its lead at all of it, at the trained and at the largest K."""

    def lead(name: str, ending: str, k: int) -> np.ndarray:
        own, other = results.quality(f"gircse{ending}", k), results.quality(f"{name}{ending}", 0)
        return np.asarray(own - other)

    return judged(
        "G10",
        [
            above(f"lead over {name} at K = {k}, a quarter to all", lead(name, "-quarter", k) - lead(name, "", k))
            for name in BASELINES[results.backbone]
            for k in (TRAINED_STEPS, MOST_STEPS)
        ],
    )


RULES: Mapping[str, Callable[[Results], Verdict]] = {
    "G1": naive_generation_degrades,
    "G2": beats_baselines,
    "G3": every_part_helps,
    "G4": rises_with_steps,
    "G5": baselines_do_not_gain,
    "G7": training_is_stable,
    "G10": gap_is_larger_with_less_data,
}


def verdict(claim: str, results: Results) -> Verdict:
    """Return what becomes of a claim, or that its results are not there."""
    try:
        return RULES[claim](results)
    except NotRunError as missing:
        return Verdict(claim, "not run", note=str(missing))
