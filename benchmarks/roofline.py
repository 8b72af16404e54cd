"""How fast could this machine be? Rates of its arithmetic and its memory, and from them the least time of each part of a refinement.

    python benchmarks/roofline.py [--configs mini qwen] [--threads 2] [--tokens 32 128] [--rows 1 32 128]

Rates are the best of several shapes and of the turns: products of float32 (Torch's and the packed ones of the engine), bfloat16 and
int8 matrices, and a copy of more memory than the caches hold, read and written bytes together. A part takes at least

    max( operations / rate of products,  bytes / bandwidth )

where the bytes are each weight once and the keys and values that are attended to. Other benchmarks print their share of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from markdown import table
from models import LOADERS, shape_of_backbone
from results_file import machine, write

from genembed.backbone import Backbone
from genembed.cost import Shape
from genembed.cpu import packable, packed_product

PRODUCTS = ((2048, 896, 4864), (2048, 384, 1536), (512, 384, 8192), (2048, 1024, 4096))
"""Rows, inputs and outputs of the products that are timed."""
COPIED = 1 << 28
"""Bytes of the copy's source: more than any cache here."""
SECONDS = 0.4
"""At least so long is each product repeated."""

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    products: dict[str, float]
    """Operations, two for a multiply-add, by type."""
    bandwidth: float
    """Bytes read and written by a copy."""

    def least(self, operations: float, moved: float, dtype: str) -> float:
        """Return the seconds that neither arithmetic nor memory can go below."""
        return max(operations / self.products[dtype], moved / self.bandwidth)


def measure(*, int8: bool = False) -> Rates:
    """Time products and a copy on the threads that Torch uses; int8 on demand, as it takes minutes where it is slow."""
    found: dict[str, float] = {}
    for dtype, makers in _makers(int8=int8).items():
        rates = [
            2 * rows * inputs * outputs / _seconds(make(rows, inputs, outputs)) for make in makers for rows, inputs, outputs in PRODUCTS
        ]
        found[dtype] = max(rates)
    # A processor without products of bfloat16 widens the numbers as it reads them.
    found["bfloat16"] = max(found["bfloat16"], found["float32"])
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    return Rates(found, 2 * COPIED / _seconds(lambda: target.copy_(source)))


def _plain(dtype: torch.dtype) -> Callable[[int, int, int], Callable[[], Any]]:
    def make(rows: int, inputs: int, outputs: int) -> Callable[[], Any]:
        first, second = torch.rand(rows, inputs).to(dtype), torch.rand(outputs, inputs).to(dtype)
        return lambda: torch.nn.functional.linear(first, second)

    return make


def _packed(dtype: torch.dtype) -> Callable[[int, int, int], Callable[[], Any]]:
    def make(rows: int, inputs: int, outputs: int) -> Callable[[], Any]:
        first, product = torch.rand(rows, inputs).to(dtype), packed_product(torch.rand(outputs, inputs).to(dtype))
        return lambda: product(first)

    return make


def _int8(rows: int, inputs: int, outputs: int) -> Callable[[], Any]:
    first, second = (torch.randint(-100, 100, size, dtype=torch.int8) for size in ((rows, inputs), (inputs, outputs)))
    return lambda: torch._int_mm(first, second)


def _makers(*, int8: bool) -> dict[str, Sequence[Callable[[int, int, int], Callable[[], Any]]]]:
    """Return the products there are on this machine, by type."""
    floats = {
        str(dtype).removeprefix("torch."): (_plain(dtype), *([_packed(dtype)] if packable(torch.empty(1, dtype=dtype)) else []))
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {**floats, **({"int8": (_int8,)} if int8 else {})}


@torch.inference_mode()
def _seconds(run: Callable[[], Any]) -> float:
    """Return the seconds of the fastest call: what the machine has done once is what it can do."""
    run()
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The least time of a model's parts on a machine."""

    shape: Shape
    rates: Rates
    tied: bool
    """Whether the vocabulary's table is read once for logits and average."""
    dtype: str = "float32"

    def prefill(self, tokens: int, rows: int) -> float:
        """Return seconds for reading `rows` prompts of `tokens` tokens."""
        attended = tokens * (tokens + 1) // 2 if self.shape.causal else tokens**2
        operations = rows * (2 * self.shape.body * tokens + 4 * self.shape.layers * self.shape.attention * attended)
        return self.rates.least(operations, BYTES[self.dtype] * self.shape.body, self.dtype)

    def soft_token(self, rows: int) -> float:
        """Return seconds for the logits of `rows` positions and the averages under them."""
        table_size = self.shape.vocabulary * self.shape.hidden
        return self.rates.least(4 * rows * table_size, BYTES[self.dtype] * table_size * (1 if self.tied else 2), self.dtype)

    def step(self, tokens: int, rows: int) -> float:
        """Return seconds for one step of `rows` texts that attend to `tokens` positions: soft token and body."""
        operations = rows * (2 * self.shape.body + 4 * self.shape.layers * self.shape.attention * tokens)
        kept = rows * tokens * 2 * self.shape.layers * self.shape.keys
        return self.soft_token(rows) + self.rates.least(operations, BYTES[self.dtype] * (self.shape.body + kept), self.dtype)

    def text(self, tokens: int, steps: float, rows: int) -> float:
        """Return seconds of one text among `rows`: its prompt and `steps` steps."""
        return (self.prefill(tokens, rows) + steps * self.step(tokens, rows)) / rows


def ceiling_of(backbone: Backbone, rates: Rates, dtype: str | None = None) -> Ceiling:
    """Return the ceiling of a model, in another dtype than its own if one is named."""
    tied = backbone.head.weight.data_ptr() == backbone.spoken.data_ptr()
    return Ceiling(shape=shape_of_backbone(backbone), rates=rates, tied=tied, dtype=dtype or str(backbone.dtype).removeprefix("torch."))


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["mini", "qwen"], choices=["mini", "mini-full", "qwen"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rates = measure(int8=True)
    shown = [[dtype, f"{rate / 1e9:.0f} Gop/s"] for dtype, rate in rates.products.items()]
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(table(["product", "rate"], [*shown, ["copy", f"{rates.bandwidth / 1e9:.1f} GB/s"]]))
    rows = []
    for name in args.configs:
        backbone = LOADERS[name]()
        for dtype in rates.products:
            ceiling = ceiling_of(backbone, rates, dtype)
            for tokens in args.tokens:
                for count in args.rows:
                    parts = (ceiling.prefill(tokens, count), ceiling.step(tokens, count), ceiling.soft_token(count))
                    least = dict(zip(("prefill", "step", "soft_token"), parts, strict=True))
                    rows.append(
                        {"model": name, "dtype": dtype, "tokens": tokens, "rows": count, **least, "text": ceiling.text(tokens, 20, count)}
                    )
    heads = ["model", "dtype", "tokens", "rows", "prefill, ms", "step, ms", "soft token, ms", "text, K = 20, ms"]
    cells = [
        [*(str(row[key]) for key in heads[:4]), *(f"{1e3 * row[key]:.3f}" for key in ("prefill", "step", "soft_token", "text"))]
        for row in rows
    ]
    print(table(heads, cells))
    path = write("roofline", {"rates": asdict(rates), "least_seconds": rows})
    print(f"written: {path}")
    print(
        json.dumps(
            {**{f"{dtype} Gop/s": round(rate / 1e9) for dtype, rate in rates.products.items()}, "GB/s": round(rates.bandwidth / 1e9, 1)}
        )
    )


if __name__ == "__main__":
    main()
