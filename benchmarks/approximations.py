"""What is gained, and lost, by refining approximately?

    python benchmarks/approximations.py [--model mini] [--threads 2] [--data ../shared/data]

K = 20 in the engine, beside the exact result:

- `fewer steps`   exact, but K = 3, 5 or 10, and the model's own halting rule: what any approximation has to beat
- `parallel`      all 20 positions are guessed and read in one pass, J times, each soft token taken from the pass before (Jacobi's
                  iteration, `parallel_passes=J`): the first J positions are exact, the others converge
- `bfloat16`      weights and activations in half precision, pooling in float32; and both together
- `top-k`         the soft token averages the k likeliest tokens alone; in the table the mass that is dropped. No option of the engine:
                  a loop of this file, timed beside the same loop over all tokens

Cosine with the exact embedding (mean, and the worst of all texts), quality on small parts of SciFact and STS-B, and the time of one query
and of batches, in turns. 8-bit weights: benchmarks/int8.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation_data import DATA
from jaxtyping import Float
from markdown import table
from results_file import machine, write
from small_sets import test_sets

import genembed
from genembed import Embedder, FixedSteps
from genembed.halting import HaltingRule
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch, TokenIds

STEPS, TURNS = 20, 9
BATCHES = (1, 8, 64)
PADDED = 32
"""Texts in a batch of the loop outside the engine."""

Vectors = Float[np.ndarray, "texts hidden"]


@dataclass(frozen=True)
class Way:
    """A way from prompts to embeddings."""

    name: str
    run: Callable[[Sequence[TokenIds]], Vectors]
    reference: str = "exact"
    """The way whose time it is compared with."""
    dropped: list[float] = field(default_factory=list)
    """Mass that each soft token left out."""


def in_engine(embedder: Embedder, rule: HaltingRule, prompts: Sequence[TokenIds]) -> Vectors:
    """Refine in the engine."""
    found = np.zeros((len(prompts), embedder.get_embedding_dimension()), dtype=np.float32)
    for done in embedder.engine.run(prompts, rule):
        found[done.index] = done.vectors
    return found


@torch.inference_mode()
def outside(embedder: Embedder, kept: int | None, dropped: list[float], prompts: Sequence[TokenIds]) -> Vectors:
    """Refine padded batches, with soft tokens over the `kept` likeliest tokens alone, their shares made to sum to one."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    found = np.zeros((len(prompts), embedder.get_embedding_dimension()), dtype=np.float32)
    for start in range(0, len(order), PADDED):
        chosen = order[start : start + PADDED]
        found[chosen] = _padded(embedder, kept, dropped, TokenBatch.pad([prompts[row] for row in chosen]))
    return found


def _padded(embedder: Embedder, kept: int | None, dropped: list[float], batch: TokenBatch) -> Vectors:
    backbone = embedder.backbone
    rows = CachedRows(backbone, batch)
    progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
    for _ in range(STEPS):
        if kept is None:
            rows.append(backbone.next_embeddings(rows.last_hidden))
        else:
            logits = backbone.head(rows.last_hidden).float() / backbone.settings.temperature
            best = logits.topk(kept)
            dropped += (1 - (best.values.logsumexp(-1) - logits.logsumexp(-1)).exp()).tolist()
            rows.append(torch.einsum("rk,rkd->rd", torch.softmax(best.values, dim=-1), backbone.spoken[best.indices]))
        progress, _ = backbone.settings.pooling.advance(progress, rows.last_hidden)
    return progress.embedding.float().numpy()


def ways_of(model: str) -> list[Way]:
    """Return what is compared, the exact one first."""
    exact, half = genembed.load(model), genembed.load(model, dtype="bfloat16")
    found = [Way("exact", partial(in_engine, exact, FixedSteps(STEPS)))]
    found += [Way(f"fewer steps, K = {k}", partial(in_engine, exact, FixedSteps(k))) for k in (3, 5, 10)]
    found.append(Way("fewer steps, its own rule", partial(in_engine, exact, exact.settings.halt)))
    for passes in (1, 2, 3, 5):
        parallel = genembed.load(model, parallel_passes=passes)
        found.append(Way(f"parallel, {passes} pass{'es' if passes > 1 else ''}", partial(in_engine, parallel, FixedSteps(STEPS))))
    found.append(Way("bfloat16", partial(in_engine, half, FixedSteps(STEPS))))
    both = genembed.load(model, dtype="bfloat16", parallel_passes=2)
    found.append(Way("bfloat16, parallel, 2 passes", partial(in_engine, both, FixedSteps(STEPS))))
    found.append(Way("loop of this file", partial(outside, exact, None, [])))
    for kept in (16, 64, 256):
        dropped: list[float] = []
        found.append(Way(f"top-{kept}", partial(outside, exact, kept, dropped), "loop of this file", dropped))
    return found


def seconds_of(ways: Sequence[Way], prompts: Sequence[TokenIds], size: int) -> dict[str, float]:
    """Time batches of one size in turns; return medians."""
    taken: dict[str, list[float]] = {one.name: [] for one in ways}
    for turn in range(TURNS + 1):
        batch = [prompts[(turn * size + row) % len(prompts)] for row in range(size)]
        for one in ways:
            begin = time.perf_counter()
            one.run(batch)
            taken[one.name].append(time.perf_counter() - begin)
    return {name: statistics.median(own[1:]) for name, own in taken.items()}  # the first turn warms up


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    tokenizer, ways = genembed.load(args.model).tokenizer, ways_of(args.model)
    sets = [own for own in test_sets(args.data) if own.name in ("scifact", "stsb")]
    prompts = {(own.name, role): tokenizer(texts).ids for own in sets for role, texts in own.texts.items()}
    seconds = {size: seconds_of(ways, prompts["scifact", "queries"], size) for size in BATCHES}
    exact: dict[tuple[str, str], Vectors] = {}
    rows: list[dict[str, Any]] = []
    for one in ways:
        vectors = {key: one.run(own) for key, own in prompts.items()}
        exact = exact or vectors
        cosines = np.concatenate([(vectors[key] * exact[key]).sum(-1) for key in exact])
        row: dict[str, Any] = {"name": one.name, "reference": one.reference, "cosine": float(cosines.mean()), "worst": float(cosines.min())}
        row["quality"] = {own.name: own.score({role: vectors[own.name, role] for role in own.texts}) for own in sets}
        row["dropped"] = statistics.mean(one.dropped) if one.dropped else None
        row |= {f"seconds_{size}": seconds[size][one.name] for size in BATCHES}
        rows.append(row)
    heads = ["", "cosine", "worst", *(own.name for own in sets), *(f"ms, batch of {size}" for size in BATCHES), "faster", "dropped mass"]
    named = {row["name"]: row for row in rows}
    print(table(heads, [_cells(row, named[row["reference"]]) for row in rows]))
    path = write(f"approximations-{Path(args.model).name}", {"model": args.model, "steps": STEPS, "rows": rows})
    print(f"written: {path}")
    print(json.dumps({row["name"]: round(named[row["reference"]]["seconds_1"] / row["seconds_1"], 2) for row in rows}))


def _cells(row: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    faster = " / ".join(f"{reference[f'seconds_{size}'] / row[f'seconds_{size}']:.2f}x" for size in BATCHES)
    return [
        row["name"],
        f"{row['cosine']:.6f}",
        f"{row['worst']:.6f}",
        *(f"{value:.2f}" for value in row["quality"].values()),
        *(f"{1e3 * row[f'seconds_{size}']:.1f}" for size in BATCHES),
        faster,
        "" if row["dropped"] is None else f"{row['dropped']:.1%}",
    ]


if __name__ == "__main__":
    main()
