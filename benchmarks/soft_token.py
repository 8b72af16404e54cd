"""The soft token alone: hidden states to softmax(h W^T / T) E, tied and untied, against the two plain products and their softmax.

    python benchmarks/soft_token.py [--rows 1 8 32 128] [--threads 2]

Shapes: `qwen` |V| = 151,936, d = 896; `mini` |V| = 30,522, d = 384; float32. `naive` is matmul, softmax, matmul; `blocked` is ours over
blocks of the vocabulary with an online softmax; `packed` the same over packed weights, as the engine runs it on a CPU; `attention` is
Torch's scaled dot product attention with keys W and values E, as one batch of queries. Variants run in turns. Memory is what the
operation itself needs beside weights and result: rows x |V| floats for `naive`, rows x block for ours. In brackets the share of the
ceiling of roofline.py, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from markdown import table
from results_file import machine, write
from roofline import measure
from torch import Tensor

from genembed.backbone import BLOCK
from genembed.cpu import packed_product
from genembed.soft_token import blocked_soft_token, soft_token

SHAPES = {"qwen": (151_936, 896), "mini": (30_522, 384)}
REPEATS = 5

Operation = Callable[[Tensor], Tensor]


def operations(weight: Float[Tensor, "vocab hidden"], embeddings: Float[Tensor, "vocab hidden"]) -> dict[str, Operation]:
    """Return the ways to compute a soft token."""
    spans = [slice(start, start + BLOCK) for start in range(0, len(weight), BLOCK)]
    packed = [(packed_product(weight[span]), packed_product(embeddings[span].T.contiguous())) for span in spans]
    plain: list[tuple[Operation, Operation]] = [
        (lambda hidden, span=span: hidden @ weight[span].T, lambda shares, span=span: shares @ embeddings[span])  # type: ignore[misc]
        for span in spans
    ]

    def blocked(blocks: list[tuple[Operation, Operation]]) -> Operation:
        return lambda hidden: blocked_soft_token(
            [lambda product=product: product(hidden) for product, _ in blocks],  # type: ignore[misc]
            [mix for _, mix in blocks],
        )

    def attention(hidden: Tensor) -> Tensor:
        keys, values = weight[None, None], embeddings[None, None]
        return torch.nn.functional.scaled_dot_product_attention(hidden[None, None], keys, values, scale=1.0)[0, 0]

    return {
        "naive": lambda hidden: soft_token(hidden @ weight.T, embeddings),
        "attention": attention,
        "blocked": blocked(plain),
        "packed": blocked(packed),
    }


@torch.inference_mode()
def compare(shape: str, *, tied: bool, rows: int, rates: Any) -> dict[str, Any]:
    """Time every way in turns, and check that they agree."""
    vocabulary, hidden_size = SHAPES[shape]
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, hidden_size) * 0.05
    embeddings = weight if tied else torch.randn(vocabulary, hidden_size) * 0.05
    hidden = torch.randn(rows, hidden_size) * 4  # logits neither flat nor one-hot
    ways = operations(weight, embeddings)
    expected = ways["naive"](hidden)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(REPEATS + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            result = run(hidden)
            seconds = time.perf_counter() - begin
            if not turn:  # the first turn warms up
                torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5)
            else:
                taken[name].append(seconds)
    size = vocabulary * hidden_size
    least = rates.least(4 * rows * size, 4 * size * (1 if tied else 2), "float32")
    naive = statistics.median(taken["naive"])
    return {
        "shape": shape,
        "tied": tied,
        "rows": rows,
        "least": least,
        "ways": {
            name: {
                "median": (median := statistics.median(own)),
                "spread": max(own) - min(own),
                "faster": naive / median,
                "share": least / median,
                "memory_mib": 4 * rows * (vocabulary if name == "naive" else BLOCK) / 2**20 if name != "attention" else None,
            }
            for name, own in taken.items()
        },
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    rates = measure()
    found = [compare(shape, tied=tied, rows=rows, rates=rates) for shape in SHAPES for tied in (True, False) for rows in args.rows]
    cells = [
        [one["shape"], "tied" if one["tied"] else "untied", str(one["rows"]), *(_cell(way) for way in one["ways"].values())]
        for one in found
    ]
    print(table(["shape", "weights", "rows", *(f"{name}, ms" for name in found[0]["ways"])], cells))
    path = write("soft_token", {"rates": vars(rates), "comparisons": found})
    print(f"written: {path}")
    print(
        json.dumps(
            {
                f"{one['shape']} {'tied' if one['tied'] else 'untied'} {one['rows']}": round(one["ways"]["packed"]["faster"], 2)
                for one in found
            }
        )
    )


def _cell(way: dict[str, Any]) -> str:
    return f"{1e3 * way['median']:.2f} ({way['share']:.0%})"


if __name__ == "__main__":
    main()
