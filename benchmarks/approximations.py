"""What is gained, and lost, by refining approximately?

    python benchmarks/approximations.py [--model mini] [--threads 2] [--data ../shared/data]

Through the reference loop, K = 20, beside the exact result:

- `fewer steps`   exact, but K = 3, 5 or 10: what any approximation has to beat
- `top-k`         the soft token averages the k likeliest tokens alone; in the table the mass that is dropped
- `Jacobi`        all 20 positions are guessed (each the first soft token) and read in one pass, J times, each soft token taken from the
                  pass before: the first J positions are exact, the others converge
- `bfloat16`      weights and activations in half precision, pooling in float32

Cosine with the exact embedding (mean, and the worst of all texts), quality on small parts of SciFact and STS-B, seconds for one query
and for eight in a batch, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation_data import DATA
from jaxtyping import Float
from markdown import table
from results_file import write
from small_sets import test_sets
from torch import Tensor

import genembed
from genembed import Embedder
from genembed.backbone import Backbone
from genembed.refine import refine
from genembed.rows import CachedRows, additive
from genembed.tokens import TokenBatch

STEPS, BATCH, TURNS = 20, 16, 7
BATCHES = (1, 8)

Method = Callable[[Backbone, TokenBatch], Float[Tensor, "rows hidden"]]


@dataclass(frozen=True)
class Approximation:
    """A way to an embedding, and the weights it runs on."""

    name: str
    method: Method
    backbone: Backbone


def fixed(backbone: Backbone, batch: TokenBatch, *, steps: int = STEPS) -> Float[Tensor, "rows hidden"]:
    """Refine exactly."""
    return refine(backbone, batch, steps=steps)[:, -1]


def top_k(backbone: Backbone, batch: TokenBatch, *, kept: int, dropped: list[float] | None = None) -> Float[Tensor, "rows hidden"]:
    """Refine with soft tokens over the likeliest tokens alone, their shares made to sum to one."""
    rows = CachedRows(backbone, batch)
    progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
    for _ in range(STEPS):
        logits = backbone.head(rows.last_hidden).float() / backbone.settings.temperature
        best = logits.topk(kept)
        if dropped is not None:
            dropped += (1 - (best.values.logsumexp(-1) - logits.logsumexp(-1)).exp()).tolist()
        shares = torch.softmax(best.values, dim=-1).to(backbone.dtype)
        rows.append(torch.einsum("rk,rkd->rd", shares, backbone.spoken[best.indices]) * backbone.embedding_scale)
        progress, _ = backbone.settings.pooling.advance(progress, rows.last_hidden)
    return progress.embedding


def jacobi(backbone: Backbone, batch: TokenBatch, *, passes: int) -> Float[Tensor, "rows hidden"]:
    """Guess all soft tokens, read them in one pass, and correct them from what was read, `passes` times.

    d_1 = soft(h_0);   d_k^(0) = d_1;   h^(j) = f([X; d_1 .. d_K^(j-1)]),   d_(k+1)^(j) = soft(h_k^(j))
    """
    rows = CachedRows(backbone, batch)
    first = backbone.next_embeddings(rows.last_hidden)
    guess = first[:, None].expand(-1, STEPS, -1)
    for place in range(passes):
        states = _read_all(backbone, rows, batch, guess)
        rows.cache.crop(-STEPS)
        if place + 1 < passes:
            later = backbone.next_embeddings(states[:, :-1].flatten(0, 1)).unflatten(0, (len(states), STEPS - 1))
            guess = torch.cat([first[:, None], later], dim=1)
    progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
    for k in range(STEPS):
        progress, _ = backbone.settings.pooling.advance(progress, states[:, k])
    return progress.embedding


def _read_all(backbone: Backbone, rows: CachedRows, batch: TokenBatch, embeddings: Float[Tensor, "rows steps hidden"]) -> Tensor:
    """Read generated positions at once: each sees the prompt and those before it."""
    steps = embeddings.shape[1]
    seen = torch.cat([batch.mask[:, None].expand(-1, steps, -1), torch.ones(len(batch.mask), steps, steps, dtype=torch.bool).tril()], dim=2)
    positions = batch.mask.sum(-1, keepdim=True) + torch.arange(steps)
    mask = additive(seen[:, None], embeddings.dtype)
    return backbone.forward(embeddings, positions=positions, mask=mask, cache=rows.cache, generated=True)


def approximations(model: str) -> list[Approximation]:
    """Return what is compared, the exact one first."""
    exact = genembed.load(model).backbone
    found = [Approximation("exact", fixed, exact)]
    found += [Approximation(f"fewer steps, K = {k}", partial(fixed, steps=k), exact) for k in (3, 5, 10)]
    found += [Approximation(f"top-{k}", partial(top_k, kept=k), exact) for k in (16, 64, 256)]
    found += [Approximation(f"Jacobi, {j} passes", partial(jacobi, passes=j), exact) for j in (1, 2, 3, 5)]
    found.append(Approximation("bfloat16", fixed, genembed.load(model, dtype="bfloat16").backbone))
    return found


@torch.inference_mode()
def vectors_of(one: Approximation, embedder: Embedder, texts: list[str]) -> Float[np.ndarray, "texts hidden"]:
    """Embed texts, those of similar length together."""
    ids = embedder.tokenizer(texts).ids
    order = sorted(range(len(texts)), key=lambda row: len(ids[row]))
    found = np.zeros((len(texts), embedder.get_embedding_dimension()), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        found[chosen] = one.method(one.backbone, TokenBatch.pad([ids[row] for row in chosen])).float().numpy()
    return found


@torch.inference_mode()
def seconds_of(ways: list[Approximation], embedder: Embedder, texts: list[str], size: int) -> dict[str, float]:
    """Time batches of one size in turns; return medians."""
    ids = embedder.tokenizer(texts).ids
    taken: dict[str, list[float]] = {one.name: [] for one in ways}
    for turn in range(TURNS + 1):
        batch = TokenBatch.pad([ids[(turn * size + row) % len(ids)] for row in range(size)])
        for one in ways:
            begin = time.perf_counter()
            one.method(one.backbone, batch)
            taken[one.name].append(time.perf_counter() - begin)
    return {name: statistics.median(own[1:]) for name, own in taken.items()}  # the first turn warms up


@torch.inference_mode()
def dropped_mass(one: Approximation, embedder: Embedder, texts: list[str]) -> float:
    """Return the mean share that the soft tokens of a top-k approximation leave out."""
    dropped: list[float] = []
    for start in range(0, len(texts), BATCH):
        one.method(one.backbone, TokenBatch.pad(embedder.tokenizer(texts[start : start + BATCH]).ids), dropped=dropped)  # type: ignore[call-arg]
    return statistics.mean(dropped)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    embedder, ways = genembed.load(args.model), approximations(args.model)
    sets = [own for own in test_sets(args.data) if own.name in ("scifact", "stsb")]
    queries = next(own for own in sets if own.name == "scifact").texts["queries"]
    seconds = {size: seconds_of(ways, embedder, queries, size) for size in BATCHES}
    exact: dict[tuple[str, str], np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for one in ways:
        vectors = {(own.name, role): vectors_of(one, embedder, texts) for own in sets for role, texts in own.texts.items()}
        exact = exact or vectors
        cosines = np.concatenate([(vectors[key] * exact[key]).sum(-1) for key in exact])
        quality = {own.name: own.score({role: vectors[own.name, role] for role in own.texts}) for own in sets}
        row: dict[str, Any] = {"name": one.name, "cosine": float(cosines.mean()), "worst": float(cosines.min()), "quality": quality}
        row |= {f"seconds_{size}": seconds[size][one.name] for size in BATCHES}
        row["dropped"] = dropped_mass(one, embedder, queries) if one.name.startswith("top-") else None
        rows.append(row)
    heads = ["", "cosine", "worst", *(own.name for own in sets), *(f"ms, batch of {size}" for size in BATCHES), "faster", "dropped mass"]
    print(table(heads, [_cells(row, rows[0]) for row in rows]))
    path = write(f"approximations-{Path(args.model).name}", {"model": args.model, "steps": STEPS, "rows": rows})
    print(f"written: {path}")
    print(json.dumps({row["name"]: round(rows[0]["seconds_1"] / row["seconds_1"], 2) for row in rows}))


def _cells(row: dict[str, Any], exact: dict[str, Any]) -> list[str]:
    faster = " / ".join(f"{exact[f'seconds_{size}'] / row[f'seconds_{size}']:.2f}x" for size in BATCHES)
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
