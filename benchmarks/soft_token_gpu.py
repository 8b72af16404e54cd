"""The soft token on a GPU: the fused kernel against matmul, softmax, matmul and against the blocks, bfloat16.

    python benchmarks/soft_token_gpu.py [--rows 1 8 32 128] [--sweep]

Shapes: `qwen` |V| = 151,936, d = 896, one table; `llama` |V| = 32,000, d = 4096, two. Correctness comes first: the error of every way
against float64, relative to the size of the result, and for the kernel that a row alone is the row in a batch to the last bit; a kernel
that fails either ends the run. Then every way is timed as launched from Python and as a CUDA graph, in turns. In brackets the share of
the ceiling, which is each table read once at the bandwidth of a copy in the same run. `fused` is left out where a shape does not fit;
with more rows than the engine uses it for, it is timed all the same. `--sweep` times other ways to cut the kernel's work.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from markdown import table
from results_file import machine, write
from torch import Tensor

from genembed.backbone import BLOCK
from genembed.cuda import MOST_ROWS, Tiling, fused_soft_token, shared_memory, tiling
from genembed.soft_token import Scores, blocked_soft_token, soft_token

SHAPES = {"qwen": (151_936, 896, True), "llama": (32_000, 4096, False)}
DTYPE = torch.bfloat16
COPIED = 1 << 31
"""Bytes of the copy's source: far more than any cache."""
REPEATS = 30
EXCESS = 1.5
"""How many times the error of the plain products the kernel's may be."""

Way = Callable[[Tensor], Tensor]


def ways(weight: Tensor, embeddings: Tensor, shared_bytes: int) -> dict[str, Way]:
    """Return the ways to compute a soft token."""
    spans = [slice(start, start + BLOCK) for start in range(0, len(weight), BLOCK)]

    def blocked(hidden: Tensor) -> Tensor:
        logits = [lambda span=span: (hidden @ weight[span].T).float() for span in spans]
        mixes = [lambda shares, span=span: (shares.to(DTYPE) @ embeddings[span]).float() for span in spans]
        return blocked_soft_token(logits, mixes).to(DTYPE)

    found: dict[str, Way] = {"naive": lambda hidden: soft_token(hidden @ weight.T, embeddings), "blocked": blocked}
    cut = tiling(weight.shape[1], tables=1 if weight is embeddings else 2, element_bytes=2, shared_bytes=shared_bytes)
    return found if cut is None else found | {"fused": fused(weight, embeddings, cut)}


def fused(weight: Tensor, embeddings: Tensor, cut: Tiling) -> Way:
    """Return the kernel with its work cut in one way."""
    return lambda hidden: fused_soft_token(hidden, weight, None, embeddings, 1.0, Scores(), cut=cut)[0].to(DTYPE)


def errors(found: dict[str, Way], hidden: Tensor, weight: Tensor, embeddings: Tensor) -> dict[str, float]:
    """Return the largest error of every way against float64, relative to the root mean square of the result."""
    exact = soft_token(hidden.double() @ weight.double().T, embeddings.double())
    size = exact.square().mean().sqrt()
    return {name: float((way(hidden).double() - exact).abs().max() / size) for name, way in found.items()}


def check(shape: str, found: dict[str, Way], wrong: dict[str, float], hidden: Tensor) -> None:
    """End the run if the kernel is wrong, or if a row's result depends on the batch."""
    if "fused" not in found:
        return
    if not wrong["fused"] <= EXCESS * wrong["naive"]:
        raise SystemExit(f"{shape}: the kernel's error is {wrong['fused']:.1e}, that of the plain products {wrong['naive']:.1e}.")
    together = found["fused"](hidden)
    for row in range(len(hidden)):
        if not torch.equal(found["fused"](hidden[row : row + 1])[0], together[row]):
            raise SystemExit(f"{shape}: row {row} alone is not row {row} in a batch of {len(hidden)}.")


def as_graph(way: Way, hidden: Tensor) -> Callable[[], Any]:
    """Return a call that replays the kernels of one call."""
    way(hidden)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way(hidden)
    return graph.replay


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Time calls in turns; return the median and the spread of each in seconds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(REPEATS + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:  # the first turns warm up
                taken[name].append(begin.elapsed_time(end) / 1e3)
    return {name: (statistics.median(own), max(own) - min(own)) for name, own in taken.items()}


def copy_bandwidth() -> float:
    """Return the bytes read and written in a second by a copy."""
    source = torch.ones(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / medians({"copy": lambda: target.copy_(source)})["copy"][0]


def tables_of(shape: str) -> tuple[Tensor, Tensor]:
    """Return random output and input embeddings."""
    vocabulary, hidden, tied = SHAPES[shape]
    torch.manual_seed(0)
    weight, other = (torch.randn(vocabulary, hidden, device="cuda").mul_(0.05).to(DTYPE) for _ in range(2))
    return weight, weight if tied else other


def states_for(weight: Tensor, rows: int) -> Tensor:
    """Return hidden states whose logits, of a deviation of 6, are neither flat nor one-hot."""
    return torch.randn(rows, weight.shape[1], device="cuda").mul_(120 / weight.shape[1] ** 0.5).to(DTYPE)


@torch.inference_mode()
def compare(shape: str, rows: Sequence[int], bandwidth: float, shared_bytes: int) -> list[dict[str, Any]]:
    """Check a shape, then time every way for each number of rows."""
    weight, embeddings = tables_of(shape)
    found = ways(weight, embeddings, shared_bytes)
    batch = states_for(weight, MOST_ROWS)
    wrong = errors(found, batch, weight, embeddings)
    print(f"{shape}: error against float64: " + ", ".join(f"{name} {error:.1e}" for name, error in wrong.items()), flush=True)
    check(shape, found, wrong, batch)
    least = weight.nbytes * (1 if weight is embeddings else 2) / bandwidth
    compared = []
    for count in rows:
        hidden = states_for(weight, count)
        launched = medians({name: partial(way, hidden) for name, way in found.items()})
        replayed = medians({name: as_graph(way, hidden) for name, way in found.items()})
        figures = {
            name: {
                "error": wrong[name],
                "launched": launched[name][0],
                "launched_spread": launched[name][1],
                "graph": replayed[name][0],
                "graph_spread": replayed[name][1],
                "share": least / replayed[name][0],
                "faster": replayed["naive"][0] / replayed[name][0],
            }
            for name in found
        }
        compared.append({"shape": shape, "rows": count, "least": least, "ways": figures})
    return compared


@torch.inference_mode()
def sweep(shape: str, rows: int, shared_bytes: int) -> list[dict[str, Any]]:
    """Time the kernel with its work cut in other ways, the fastest first."""
    weight, embeddings = tables_of(shape)
    _, length, tied = SHAPES[shape]
    cuts = [
        Tiling(entries=entries, rows=block, stages=stages, splits=splits)
        for entries, block, stages, splits in product((16, 32, 64), (16, 32), (2, 3, 4, 5), (132, 264))
    ]
    cuts = [cut for cut in cuts if cut.shared_bytes(length, tables=1 if tied else 2, element_bytes=2) <= shared_bytes]
    hidden = states_for(weight, rows)
    timed = medians({repr(cut): as_graph(fused(weight, embeddings, cut), hidden) for cut in cuts if cut.padded(length) <= 2048})
    return [{"shape": shape, "rows": rows, "cut": name, "graph": timed[name][0]} for name in sorted(timed, key=lambda name: timed[name])]


def main() -> None:
    """Check, measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--sweep", action="store_true", help="also time other ways to cut the kernel's work")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here, and this benchmark measures nothing else; for a CPU see soft_token.py.")
    device = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"{device.name}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    limit = shared_memory(torch.device("cuda", 0))
    found = [one for shape in SHAPES for one in compare(shape, args.rows, bandwidth, limit)]
    swept = [sweep(shape, rows, limit) for shape in SHAPES for rows in (1, MOST_ROWS)] if args.sweep else []
    values = {"device": device.name, "bandwidth": bandwidth, "comparisons": found, "sweep": swept}
    path = write("soft_token", values, hardware=device.name.lower().removeprefix("nvidia ").replace(" ", "-"))
    names = ("naive", "blocked", "fused")
    cells = [[one["shape"], str(one["rows"]), *(_cell(one["ways"].get(name)) for name in names)] for one in found]
    print(table(["shape", "rows", *(f"{name}: launched, graph, us" for name in names)], cells))
    for one in [one for cuts in swept for one in cuts[:3]]:
        print(f"{one['shape']}, rows {one['rows']}: {1e6 * one['graph']:.1f} us with {one['cut']}")
    print(f"written: {path}")
    fastest = {f"{one['shape']} {one['rows']}": round(one["ways"]["fused"]["faster"], 2) for one in found if "fused" in one["ways"]}
    print(json.dumps(fastest))


def _cell(way: dict[str, Any] | None) -> str:
    return "does not fit" if way is None else f"{1e6 * way['launched']:.0f}, {1e6 * way['graph']:.0f} ({way['share']:.0%})"


if __name__ == "__main__":
    main()
