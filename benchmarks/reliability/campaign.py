"""What every row of the campaign has in common: a size and a seed, what was tried, what was wrong, and a result file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path(__file__).parents[2]
for _folder in (_ROOT / "benchmarks", _ROOT / "tests"):  # what benchmarks share; the tiny random models
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

from results_file import RESULTS, machine, write  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

import doubles  # noqa: E402

_SHOWN = 20
"""Things that were wrong that a result file names."""


def tiny_folder(place: Path) -> Path:
    """Save a tiny random language model, and return its folder."""
    disable_progress_bar()
    folder: Path = doubles.saved("qwen2", place)
    return folder


@dataclass
class Tally:
    """What was tried, and what was wrong with it."""

    tried: int = 0
    wrong: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """How often each kind of case was tried."""
    examples: list[str] = field(default_factory=list)
    """The first things that were wrong."""
    figures: dict[str, float | int | str] = field(default_factory=dict)
    """What was measured beside."""
    series: dict[str, list[float]] = field(default_factory=dict)
    """Readings over time, for a graph."""
    missed: list[str] = field(default_factory=list)
    """Goals of measured figures that were missed."""

    def check(self, right: bool, kind: str, otherwise: str = "") -> None:
        """Count one case; `otherwise` says what is wrong with it if it is not right."""
        self.tried += 1
        self.kinds[kind] += 1
        if not right:
            self.wrong += 1
            if len(self.examples) < _SHOWN:
                self.examples.append(f"{kind}: {otherwise}")

    def measure(self, name: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        """Keep a figure, and note whether it misses its goal."""
        self.figures[name] = float(f"{value:.4g}")
        if at_most is not None and not value <= at_most:
            self.missed.append(f"{name} {value:.4g}, goal at most {at_most:g}")
        if at_least is not None and not value >= at_least:
            self.missed.append(f"{name} {value:.4g}, goal at least {at_least:g}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: a property, and the script that tries to break it."""

    name: str
    """Of the result file."""
    property: str
    """What is promised, in a few words."""
    size: int
    """Of the long form."""
    unit: str
    """What the size counts."""
    run: Callable[[int, int], Tally]
    """From size and seed to what was found."""


def main(row: Row, description: str | None) -> None:
    """Run a row from the command line: print what was tried and what was wrong, and write the result file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=row.size, help=f"{row.unit} (default: {row.size}, the long form)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    tally, seconds = timed(row, arguments.size, arguments.seed)
    for example in tally.examples:
        print(f"wrong: {example}")
    for missed in tally.missed:
        print(f"missed: {missed}")
    print(
        "written:", write(f"reliability-{row.name}", result(row, tally, arguments.size, arguments.seed, seconds), folder=arguments.output)
    )
    print(json.dumps({"row": row.name, "tried": tally.tried, "wrong": tally.wrong, **tally.figures}))
    if tally.wrong:
        raise SystemExit(f"{tally.wrong} of {tally.tried} cases are wrong")


def timed(row: Row, size: int, seed: int) -> tuple[Tally, float]:
    """Run a row; return what it found, and the seconds it took."""
    begin = time.perf_counter()
    return row.run(size, seed), time.perf_counter() - begin


def result(row: Row, tally: Tally, size: int, seed: int, seconds: float) -> dict[str, object]:
    """Return what the result file says."""
    return {
        "row": row.name,
        "property": row.property,
        "size": size,
        "long_form": row.size,
        "unit": row.unit,
        "seed": seed,
        "seconds": round(seconds, 1),
        "tried": tally.tried,
        "wrong": tally.wrong,
        "kinds": dict(sorted(tally.kinds.items())),
        "examples": tally.examples,
        "figures": tally.figures,
        "missed": tally.missed,
        **({"series": tally.series} if tally.series else {}),
    }
