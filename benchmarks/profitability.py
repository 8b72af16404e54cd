"""Is halting ever slower than not halting? Every trace beside K = 20, turn by turn.

    python benchmarks/profitability.py [--models mini] [--kinds queries documents] [--turns 15]

In each turn the engine does K = 20 and every recorded trace of halting steps (near 9, near 18, 4-20; throughput.py) once, one straight
after the other, so that what else the machine does meets them alike. A ratio is a trace's seconds over those of K = 20 in the same
turn; printed are the median over the turns, its interval (the order statistics that hold the median of such ratios at 95 %), and the
least that the steps saved allow. Fails where an interval lies above 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from loops import STEPS, engine_loop, prompts_of
from markdown import table
from models import LOADERS
from results_file import machine, write
from throughput import TEXTS, traces

from genembed import FixedSteps
from genembed.engine import Engine


def ratios(model: str, kind: str, turns: int) -> list[dict[str, Any]]:
    """Compare every trace with K = 20 on one kind of texts."""
    backbone = LOADERS[model]()
    engine = Engine(backbone)
    count = TEXTS[model][kind != "queries"]
    prompts = prompts_of(kind, count, len(backbone.table), (backbone.max_positions or 1 << 20) - STEPS)
    rules: dict[str, Any] = {f"K={STEPS}": FixedSteps(STEPS), **traces(count)}
    taken: dict[str, list[float]] = {name: [] for name in rules}
    done: dict[str, int] = {}
    for turn in range(-1, turns):
        for name, rule in rules.items():
            begin = time.perf_counter()
            done[name] = engine_loop(engine, prompts, rule)
            if turn >= 0:
                taken[name].append(time.perf_counter() - begin)
    full = np.asarray(taken.pop(f"K={STEPS}"))
    return [
        {
            "model": model,
            "kind": kind,
            "trace": name,
            "iterations": done[name] / (STEPS * count),
            "ratios": (np.asarray(own) / full).round(4).tolist(),
            **summary(np.asarray(own) / full),
        }
        for name, own in taken.items()
    ]


def summary(found: np.ndarray) -> dict[str, float]:
    """Return the median, and the order statistics between which that of all possible turns lies with 95 %."""
    ordered, turns = np.sort(found), len(found)
    below = 0
    while below < turns // 2 and 2 * sum(math.comb(turns, k) for k in range(below + 1)) / 2**turns <= 0.05:
        below += 1
    first = max(below - 1, 0)
    return {"median": float(np.median(found)), "low": float(ordered[first]), "high": float(ordered[turns - 1 - first])}


def shown(one: Mapping[str, Any]) -> str:
    """Return a ratio with its interval."""
    return f"{one['median']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini"], choices=list(LOADERS))
    parser.add_argument("--kinds", nargs="+", default=["queries", "documents"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    found = [one for model in arguments.models for kind in arguments.kinds for one in ratios(model, kind, arguments.turns)]
    rows = [
        [
            one["model"],
            one["kind"],
            one["trace"],
            f"{one['iterations']:.2f}",
            f"{one['median']:.3f} ({one['low']:.3f} to {one['high']:.3f})",
        ]
        for one in found
    ]
    print(table(["", "", "halting", "iterations / K=20", "seconds / K=20"], rows))
    print(f"written: {write('profitability', {'turns': arguments.turns, 'rows': found})}")
    slower = [f"{one['model']} {one['kind']} {one['trace']}" for one in found if one["low"] > 1]
    print(json.dumps({"slower": slower}))
    sys.exit(bool(slower))


if __name__ == "__main__":
    main()
