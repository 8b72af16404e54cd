"""How often is a halting rule certified falsely? Thousands of synthetic worlds in which the true risk is known.

    python benchmarks/calibration.py [--worlds 2000]

A world has a chain of candidates from safe to bold and n development queries. A query changes its result under a candidate if the
candidate is bold enough for it (the same query changes under all bolder ones), and then loses or gains as nDCG@10 and Jaccard@10 do: in
a few large steps. The true risk of candidate j is known exactly. *False*: the chosen rule's true risk is at least epsilon. Beside the
certified choice stands the naive one, the boldest candidate whose mean over the development queries is within epsilon.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results_file import RESULTS, write
from scipy.stats import beta

from genembed.calibrate.betting import SIGNED, UNIT, LossRange, certified

DELTA = 0.1
CANDIDATES = 16
SIZES = (100, 300, 1_000)


@dataclass(frozen=True)
class Kind:
    """A loss, the bound asked for, and what it is when a result changes."""

    name: str
    within: LossRange
    epsilon: float
    values: tuple[float, ...]
    """Losses of a changed result, equally likely."""


KINDS = (
    Kind("ndcg", SIGNED, 0.02, (1.0, 0.63, 0.5, 0.37, 0.13, 0.13, 0.37, -0.13, -0.37, -0.37, -0.13)),
    Kind("jaccard", UNIT, 0.05, (1 - 9 / 11, 1 - 9 / 11, 1 - 9 / 11, 1 - 8 / 12, 1 - 7 / 13, 1 - 5 / 15)),
)


def world(kind: Kind, queries: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the losses [queries, candidates] of one world, and the true risk of each candidate."""
    mean = float(np.mean(kind.values))
    # From well within the bound to well beyond it; where it is crossed differs from world to world.
    risks = kind.epsilon * np.sort(rng.uniform(0.1, 2.5, CANDIDATES))
    changed = rng.random((queries, 1)) < np.minimum(risks / mean, 1.0)
    losses = np.where(changed, rng.choice(kind.values, size=(queries, 1)), 0.0)
    return losses, np.minimum(risks / mean, 1.0) * mean


def naive(losses: np.ndarray, epsilon: float) -> int:
    """Return how many candidates the naive rule would go along the chain: to the boldest whose mean loss is within epsilon."""
    within = np.flatnonzero(losses.mean(axis=0) <= epsilon)
    return int(within[-1]) + 1 if len(within) else 0


def upper(wrong: int, tried: int) -> float:
    """Return the upper end of the one-sided 95 % interval of a rate (Clopper and Pearson)."""
    return 1.0 if wrong == tried else float(beta.ppf(0.95, wrong + 1, tried - wrong))


def measured(kind: Kind, queries: int, worlds: int) -> dict[str, Any]:
    """Count false choices over many worlds."""
    false = {"certified": 0, "naive": 0}
    found, reach = 0, []
    for number in range(worlds):
        losses, risks = world(kind, queries, np.random.default_rng([queries, number]))
        chosen = {
            "certified": certified(losses, epsilon=kind.epsilon, delta=DELTA, within=kind.within, seed=number),
            "naive": naive(losses, kind.epsilon),
        }
        for name, count in chosen.items():
            false[name] += bool(count) and bool(risks[count - 1] >= kind.epsilon)
        sound = int((risks < kind.epsilon).sum())
        found += chosen["certified"] > 0
        reach.append(chosen["certified"] / max(sound, 1))
    return {
        "loss": kind.name,
        "epsilon": kind.epsilon,
        "queries": queries,
        "worlds": worlds,
        **{f"false_{name}": count / worlds for name, count in false.items()},
        **{f"false_{name}_upper95": upper(count, worlds) for name, count in false.items()},
        "something_certified": found / worlds,
        "share_of_sound_candidates": float(np.mean(reach)),
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=2_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for kind in KINDS:
        for queries in SIZES:
            rows.append(row := measured(kind, queries, arguments.worlds))
            print(
                f"{kind.name:<8} epsilon {kind.epsilon:.2f}  {queries:>5} queries  false: certified {row['false_certified']:.3f} "
                f"(at most {row['false_certified_upper95']:.3f}), naive {row['false_naive']:.3f}  "
                f"certified anything {row['something_certified']:.2f}, share of sound candidates {row['share_of_sound_candidates']:.2f}",
                flush=True,
            )
    print("written:", write("calibration", {"delta": DELTA, "rows": rows}, folder=arguments.output))
    worst = max(row["false_certified_upper95"] for row in rows)
    print(json.dumps({"delta": DELTA, "worst upper bound of false certification": round(worst, 4)}))
    if worst > DELTA:
        raise SystemExit(f"false certification may be above delta={DELTA}")


if __name__ == "__main__":
    main()
