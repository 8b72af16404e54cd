"""The table of docs/reliability.md: what was tried to break each promise, and what broke."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markdown import table
from results_file import newest, source

ORDER = (
    *("batch-invariance", "boundary-lengths", "bad-requests", "overload", "cancellation", "drain", "fault-isolation"),
    *("killed-jobs", "killed-training", "hostile-folders", "coverage-fuzzing", "certificates", "soak", "soak-control"),
)
"""Rows, as they are shown; one that has not been run is left out."""


def reliability() -> str:
    """What was tried and what was wrong, row by row."""
    found = [one for name in ORDER if (one := newest(f"reliability-{name}")) is not None]
    rows = [_row(path, result) for path, result in found]
    machines = sorted({_machine(result) for _, result in found})
    heads = ["what is promised", "tried", "wrong", "goals missed", "size of the run, seed, time"]
    return f"{'; '.join(machines)}.\n\n{table(heads, rows)}"


def _row(path: Path, result: dict[str, Any]) -> list[str]:
    whole = "" if result["size"] >= result["long_form"] else f" of {result['long_form']:,}"
    run = f"{result['size']:,}{whole} {result['unit']}, {result['seed']}, {result['seconds']:,.0f} s; {source(path)}"
    return [result["property"], f"{result['tried']:,}", f"{result['wrong']:,}", "; ".join(result["missed"]), run]


def _machine(result: dict[str, Any]) -> str:
    about = result["machine"]
    return f"{about['processor']}, Python {about['python']}, torch {about['torch']}, {about['date']}"
