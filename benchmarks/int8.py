"""Do 8-bit weights pay on this CPU?

    pip install torchao
    python benchmarks/int8.py [--threads 2]

torchao's weight-only and dynamic quantisation (as it runs without a compiler), and the operator inside Torch that it calls on a
compiled model, beside the packed products of the engine. The linear layers of `mini` and of Qwen2.5-0.5B's shape with 1 to 256 rows;
weights as they come from a loop over layers, not from the cache. In turns, median.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from markdown import table
from results_file import machine, write
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from genembed.cpu import packed_product

SHAPES = {
    "mini, attention": (384, 384),
    "mini, feed-forward": (1536, 384),
    "0.5B, feed-forward": (4864, 896),
    "0.5B, vocabulary": (4096, 896),
}
"""Out and in, of a layer or a block of the vocabulary."""
ROWS = (1, 20, 64, 256)
COLD_BYTES = 96e6
"""Of float32 weights in one loop: more than the cache holds."""
TURNS = 9

Product = Callable[[Tensor], Tensor]


def quantised(layer: nn.Linear, config: Any, dtype: torch.dtype) -> Product:
    """Return a layer under a quantisation of torchao."""
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features)).to(dtype).requires_grad_(False)
    quantize_(model, config)
    return lambda inputs: model(inputs.to(dtype))


def operator(layer: nn.Linear) -> Product:
    """Return Torch's own product of bfloat16 with 8-bit weights."""
    scales = layer.weight.abs().amax(1) / 127
    weight = (layer.weight / scales[:, None]).round().to(torch.int8)
    return lambda inputs: torch._weight_int8pack_mm(inputs.bfloat16(), weight, scales.bfloat16())


WAYS: dict[str, Callable[[nn.Linear], Product]] = {
    "packed float32": lambda layer: packed_product(layer.weight, layer.bias),
    "packed bfloat16": lambda layer: packed_product(layer.weight.bfloat16(), layer.bias.bfloat16()),
    "weight-only, float32": lambda layer: quantised(layer, Int8WeightOnlyConfig(), torch.float32),
    "weight-only, bfloat16": lambda layer: quantised(layer, Int8WeightOnlyConfig(), torch.bfloat16),
    "dynamic, bfloat16": lambda layer: quantised(layer, Int8DynamicActivationInt8WeightConfig(), torch.bfloat16),
    "Torch's operator": operator,
}


@torch.inference_mode()
def measured(out: int, inner: int, rows: int) -> dict[str, float]:
    """Return microseconds of one product by way."""
    copies = max(2, int(COLD_BYTES / (4 * out * inner)))
    layers = [nn.Linear(inner, out).requires_grad_(False) for _ in range(copies)]
    products = {name: [make(layer) for layer in layers] for name, make in WAYS.items()}
    inputs = {name: torch.randn(rows, inner).to(torch.bfloat16 if "bfloat16" in name else torch.float32) for name in WAYS}
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(TURNS):
        for name, own in products.items():
            begin = time.perf_counter()
            for product in own:
                product(inputs[name])
            taken[name].append(1e6 * (time.perf_counter() - begin) / copies)
    return {name: statistics.median(own[1:]) for name, own in taken.items()}  # the first turn warms up


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    rows: list[dict[str, Any]] = [
        {"layer": name, "rows": count, "us": measured(*shape, count)} for name, shape in SHAPES.items() for count in ROWS
    ]
    print(table(["layer", "rows", *(f"{way}, us" for way in WAYS)], [_cells(row) for row in rows]))
    path = write("int8", {"torchao": importlib.metadata.version("torchao"), "rows": rows})
    print(f"written: {path}")
    fastest = [min(row["us"], key=row["us"].__getitem__) for row in rows]
    print(json.dumps({way: fastest.count(way) for way in WAYS}))


def _cells(row: dict[str, Any]) -> list[str]:
    return [row["layer"], str(row["rows"]), *(f"{row['us'][way]:.0f}" for way in WAYS)]


if __name__ == "__main__":
    main()
