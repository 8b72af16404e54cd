"""How fast is the engine, against the paper's algorithm and against what the machine could do?

    python benchmarks/throughput.py [--models mini mini-full qwen qwen-bf16] [--kinds queries documents] [--repeats 3] [--check]

On `mini`, on `mini` with a head over its whole vocabulary, and on a random model of Qwen2.5-0.5B's shape in either precision, for queries
of mean 20 tokens and documents of mean 128, 200 or 512, side by side, in turns:

- `causal-eos`   the engine without refinement: one pass, the unit of every ratio
- `plain`        the paper's algorithm 1 as released: padded batches of 32 in the given order, logits at all positions, no compaction
- `sorted`       the same loop with texts sorted by length and logits at the last position only
- `engine`, `engine K=1`, `engine K=5`   ours, K = 20, 1 and 5
- `engine near 9`, `engine near 18`, `engine 4-20`   ours, with every text halting at a recorded step: 9 +- 0.5, 18 +- 1, or evenly
                 spread over 4 to 20
- `engine, N rows`   ours with at most N rows in a batch (`--rows`), beside one pass with as many, in a result file of its own

The FLOP bound of a ratio to `causal-eos` is that of genembed.cost at the mean length. The ceiling is that of roofline.py, measured in the
same run. Iteration saving is 1 - (steps done)/(20 * texts); the decode phase is the time beyond `causal-eos`. `--check` fails where a
ratio to `causal-eos` is over 15 % worse than in the newest result file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loops import BATCH, KINDS, STEPS, RecordedSteps, engine_loop, plain_loop, prompts_of
from models import LOADERS, one_pass, shape_of_backbone
from results_file import RESULTS, machine, newest, write
from roofline import Rates, ceiling_of, measure

from genembed import FixedSteps
from genembed.budget import DEFAULT_BUDGET, Budget
from genembed.cost import Cost
from genembed.engine import Engine

UNIT, ENGINE = "causal-eos", "engine"
TEXTS = {"mini": (512, 128), "mini-full": (512, 128), "qwen": (32, 32), "qwen-bf16": (32, 32)}
"""Queries, and documents, in a run."""
WORSE = 0.15
"""A ratio that has risen by more is a regression."""

Run = Callable[[], int]
"""Does the work once, and returns the steps done."""


@dataclass(frozen=True)
class Subject:
    """A model and texts for it."""

    model: str
    kind: str
    prompts: list[Any]
    repeats: int
    rates: Rates

    @property
    def mean_length(self) -> float:
        """Mean prompt tokens."""
        return float(np.mean([len(ids) for ids in self.prompts]))


def traces(count: int) -> dict[str, RecordedSteps]:
    """Return recorded halting steps: narrow distributions as the paper's, and a wide one."""
    rng = np.random.default_rng(1)
    steps = {
        "near 9": rng.normal(9, 0.5, count).round(),
        "near 18": rng.normal(18, 1.0, count).round(),
        "4-20": rng.integers(4, STEPS + 1, count),
    }
    return {name: RecordedSteps(torch.from_numpy(np.clip(own, 1, STEPS).astype(int))) for name, own in steps.items()}


def variants(subject: Subject, rows: list[int]) -> dict[str, Run]:
    """Return what is timed, each warmed up.

    The plain loops run on a model of their own: the engine packs the weights of its model.
    """
    backbone, stock, prompts = LOADERS[subject.model](), LOADERS[subject.model](), subject.prompts
    single = one_pass(backbone)
    rules: dict[str, Any] = {f"{ENGINE} K={k}": FixedSteps(k) for k in (1, 5)}
    rules |= {f"{ENGINE} {name}": trace for name, trace in traces(len(prompts)).items()}

    def engine(halt: Any, budget: Budget = DEFAULT_BUDGET) -> Run:
        made = Engine(backbone if halt.max_steps else single, budget)
        return lambda: engine_loop(made, prompts, halt)

    found: dict[str, Run] = {
        UNIT: engine(FixedSteps(0)),
        "plain": lambda: plain_loop(stock, prompts, improved=False),
        "sorted": lambda: plain_loop(stock, prompts, improved=True),
        ENGINE: engine(FixedSteps(STEPS)),
        **{name: engine(rule) for name, rule in rules.items()},
    }
    for count in rows:
        budget = Budget(max_rows=count, batch_tokens=1 << 20)
        found |= {f"{UNIT}, {count} rows": engine(FixedSteps(0), budget), f"{ENGINE}, {count} rows": engine(FixedSteps(STEPS), budget)}
    for warm_up in (backbone, stock):
        plain_loop(warm_up, prompts[:4], improved=True)
    engine_loop(Engine(backbone), prompts[:BATCH], FixedSteps(2))
    engine_loop(Engine(single), prompts[:BATCH], FixedSteps(0))
    return found


def compare(subject: Subject, rows: list[int]) -> dict[str, Any]:
    """Time every variant in turn, and print and return the table."""
    runs = variants(subject, rows)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    steps: dict[str, int] = {}
    for _ in range(subject.repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            steps[name] = run()
            taken[name].append(time.perf_counter() - begin)
    backbone = LOADERS[subject.model]()
    cost = Cost(shape=shape_of_backbone(backbone), tokens=round(subject.mean_length), steps=STEPS)
    ceiling = ceiling_of(backbone, subject.rates)
    count = len(subject.prompts)
    least = {name: ceiling.text(round(subject.mean_length), own / count, _rows_of(name, count)) * count for name, own in steps.items()}
    found = {
        "model": subject.model,
        "kind": subject.kind,
        "texts": count,
        "mean_tokens": subject.mean_length,
        "flop_bound": cost.cached / cost.one_pass,
        "variants": {name: measured(name, taken, steps, least) for name in runs},
    }
    show(found)
    return found


def _rows_of(name: str, count: int) -> int:
    """Return the rows in a batch of a variant, as its name says."""
    limit = int(name.split()[-2]) if name.endswith("rows") else BATCH if name in ("plain", "sorted") else DEFAULT_BUDGET.max_rows
    return min(limit, count)


def measured(name: str, taken: Mapping[str, list[float]], steps: Mapping[str, int], least: Mapping[str, float]) -> dict[str, Any]:
    """Return what the seconds of a variant say."""
    median = {other: statistics.median(own) for other, own in taken.items()}
    count = steps[ENGINE] / STEPS
    unit = median[name.replace(ENGINE, UNIT)] if name.endswith("rows") else median[UNIT]
    halting = name.startswith(f"{ENGINE} ") and "K=" not in name
    return {
        "seconds": taken[name],
        "ms_per_text": 1e3 * median[name] / count,
        "texts_per_second": count / median[name],
        "spread": (max(taken[name]) - min(taken[name])) / median[name],
        "iterations": steps[name],
        "to_causal_eos": median[name] / unit,
        "plain_over_this": median["plain"] / median[name],
        "share_of_ceiling": least[name] / median[name],
        "saving": saving(1 - steps[name] / steps[ENGINE], median[name], median[ENGINE], median[UNIT]) if halting else None,
    }


def saving(iterations: float, halted: float, full: float, unit: float) -> dict[str, float]:
    """Return what halting saves of the decoding and of the whole time, with the most it could."""
    decode = (full - halted) / (full - unit)
    return {
        "iterations": iterations,
        "decode": decode,
        "share": decode / iterations,
        "wall_clock": 1 - halted / full,
        "ceiling": iterations * (full - unit) / full,
    }


def show(found: Mapping[str, Any]) -> None:
    """Print one comparison."""
    print(
        f"\n{found['model']}, {found['texts']} {found['kind']}, mean {found['mean_tokens']:.0f} tokens; "
        f"FLOP bound of K={STEPS} to causal-eos: {found['flop_bound']:.2f}"
    )
    heads = (("ms/text", 9), ("texts/s", 9), ("spread", 8), ("/causal-eos", 13), ("plain/this", 12), ("of ceiling", 12))
    print(f"  {'variant':<22}" + "".join(f"{head:>{width}}" for head, width in heads) + f"{'decode/iteration saving':>52}")
    for name, row in found["variants"].items():
        note = ""
        if row["saving"]:
            note = "{decode:.0%} / {iterations:.0%} = {share:.2f}, wall {wall_clock:.0%} of at most {ceiling:.0%}".format(**row["saving"])
        print(
            f"  {name:<22}{row['ms_per_text']:>9.2f}{row['texts_per_second']:>9.1f}{row['spread']:>8.0%}{row['to_causal_eos']:>13.2f}"
            f"{row['plain_over_this']:>12.2f}{row['share_of_ceiling']:>12.0%}{note:>52}",
            flush=True,
        )


def regressions(found: list[dict[str, Any]], before: Mapping[str, Any]) -> list[str]:
    """Name the engine's ratios to one pass that are more than `WORSE` above those of a stored run."""
    old = {(one["model"], one["kind"], name): row for one in before["comparisons"] for name, row in one["variants"].items()}
    worse = []
    for one in found:
        for name, row in one["variants"].items():
            known = old.get((one["model"], one["kind"], name))
            if known is None or not name.startswith(ENGINE):
                continue
            ratio, was = row["to_causal_eos"], known["to_causal_eos"]
            if ratio > (1 + WORSE) * was:
                worse.append(f"{one['model']} {one['kind']}, {name}: {ratio:.2f} of one pass, was {was:.2f}")
    return worse


def main() -> None:
    """Run the comparisons, write a result file for each model, and compare with the last ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini", "qwen"], choices=list(LOADERS))
    parser.add_argument("--kinds", nargs="+", default=["queries", "documents"], choices=list(KINDS))
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="rows in a batch, to compare batch sizes")
    parser.add_argument(
        "--texts", type=int, default=None, help="texts in a run (default: 512 queries or 128 documents for mini, 32 for qwen)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", action="store_true", help="fail where a ratio is over 15 %% worse than in the newest result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    rates, worse = measure(), list[str]()
    summary: dict[str, float] = {}
    for model in args.models:
        theme, found = f"{'batches' if args.rows else 'throughput'}-{model}", []
        for kind in args.kinds:
            backbone = LOADERS[model]()
            limit = (backbone.max_positions or 1 << 20) - STEPS
            count = args.texts or TEXTS[model][kind != "queries"]
            prompts = prompts_of(kind, count, len(backbone.table), limit)
            found.append(compare(Subject(model, kind, prompts, args.repeats, rates), args.rows))
        before, dtype = newest(theme), str(LOADERS[model]().dtype).removeprefix("torch.")
        worse += regressions(found, before[1]) if before is not None else []
        summary |= {f"{model} {one['kind']}": round(one["variants"][ENGINE]["plain_over_this"], 2) for one in found}
        path = write(theme, {"dtype": dtype, "steps": STEPS, "rates": vars(rates), "comparisons": found}, folder=args.output)
        print(f"\nwritten: {path}")
    for line in worse:
        print(f"slower than the last stored run: {line}")
    print(json.dumps(summary))
    if args.check and worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
