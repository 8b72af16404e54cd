"""One query at a time: how long does a user wait?

    python benchmarks/latency.py [--models mini qwen qwen-bf16] [--queries 60] [--threads 2]

Queries of mean 20 tokens, one after another, warm: one pass, K = 20, K = 20 in one and in two passes over all steps at once, and K = 20
by the paper's plain loop (logits at the last position alone), in turns, query by query. The ceiling is that of roofline.py, measured in
the same run: every step, and every pass over all steps, reads all weights once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from loops import STEPS, engine_loop, plain_loop, prompts_of
from markdown import table
from models import LOADERS, one_pass, parallel
from results_file import machine, write
from roofline import Rates, ceiling_of, measure

from genembed import FixedSteps
from genembed.engine import Engine

PASSES = (1, 2)
GOAL_MS, GOAL_CEILINGS = 25.0, 2.0
"""One query with `mini`, K = 20: at most so long, or so many ceilings, whichever is longer."""


def measured(name: str, queries: int, rates: Rates) -> dict[str, Any]:
    """Time one model."""
    backbone, stock = LOADERS[name](), LOADERS[name]()
    engine, single = Engine(backbone), Engine(one_pass(backbone))
    prompts = prompts_of("queries", queries + 3, len(backbone.table), 256)
    at_once = {j: Engine(parallel(backbone, j)) for j in PASSES}
    ways: dict[str, Callable[[list[Any]], int]] = {
        "one pass": lambda own: engine_loop(single, own, FixedSteps(0)),
        f"K = {STEPS}": lambda own: engine_loop(engine, own, FixedSteps(STEPS)),
        **{f"K = {STEPS}, {j} at once": partial(engine_loop, own, halt=FixedSteps(STEPS)) for j, own in at_once.items()},
        f"K = {STEPS}, plain loop": lambda own: plain_loop(stock, own, improved=True),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for prompt in prompts:
        for way, run in ways.items():
            begin = time.perf_counter()
            run([prompt])
            taken[way].append(1e3 * (time.perf_counter() - begin))
    ceiling = ceiling_of(backbone, rates)
    tokens = round(float(np.mean([len(prompt) for prompt in prompts])))
    prefill = ceiling.text(tokens, 0, 1)
    seconds = {"one pass": prefill, **{f"K = {STEPS}, {j} at once": prefill + j * ceiling.step(tokens, STEPS) for j in PASSES}}
    least = {way: 1e3 * seconds.get(way, ceiling.text(tokens, STEPS, 1)) for way in ways}
    return {
        "model": name,
        "tokens": tokens,
        "ways": {
            way: {"p50": float(np.median(own[3:])), "p95": float(np.quantile(own[3:], 0.95)), "least": least[way]}
            for way, own in taken.items()
        },
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini", "qwen", "qwen-bf16"], choices=list(LOADERS))
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    rates = measure()
    found = [measured(name, args.queries if name == "mini" else max(5, args.queries // 6), rates) for name in args.models]
    rows = [
        [one["model"], way, f"{own['p50']:.2f}", f"{own['p95']:.2f}", f"{own['least']:.2f}", f"{own['p50'] / own['least']:.2f}x"]
        for one in found
        for way, own in one["ways"].items()
    ]
    print(table(["model", "way", "p50, ms", "p95, ms", "ceiling, ms", "p50 / ceiling"], rows))
    path = write("latency", {"rates": vars(rates), "models": found, "goal_ms": GOAL_MS, "goal_ceilings": GOAL_CEILINGS})
    print(f"written: {path}")
    print(json.dumps({f"{one['model']}, {way}": round(own["p50"], 2) for one in found for way, own in one["ways"].items()}))


if __name__ == "__main__":
    main()
