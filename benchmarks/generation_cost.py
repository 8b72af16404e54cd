"""What K = 20 costs beside one pass, by length of the prompt: operations counted and seconds measured. Claim G6 of docs/reproduction.md.

    python benchmarks/generation_cost.py [--models mini qwen] [--repeats 3] [--threads 2] [--again]

The paper counts operations: 1.0 to 1.1 of one pass with a cache, where prompts are long. Seconds also pay for reading all weights
once a step. Both ways go through the engine, texts of one length at a time, in turns; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation_data import DATA
from halting_verdicts import LIMIT
from loops import STEPS, engine_loop
from models import LOADERS, one_pass, shape_of, shape_of_backbone
from results_file import RESULTS, is_kept, machine
from tqdm import tqdm
from transformers import MistralConfig, Qwen2Config

from genembed import FixedSteps
from genembed.backbone import Backbone
from genembed.cost import Cost, Shape
from genembed.engine import Engine
from genembed.tokens import TokenIds
from genembed.train.durable import replace_text

FOLDER = RESULTS / "generation_cost"
LENGTHS = {"mini": (16, 32, 64, 128, 256, 480), "qwen": (128, 512, 2048)}
"""Prompt tokens; `mini` has 512 positions, the generated ones among them."""
COUNTED = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Prompt tokens for which operations alone are counted."""
POSITIONS = 2_048
"""Prompt tokens of a run: fewer texts where they are longer."""
PAPER = {
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True,
    ),
    "Mistral-7B": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32_000,
    ),
}  # fmt: skip
"""Counted alone."""


def counted(shape: Shape, length: int) -> float:
    """Return the operations of K = 20 as a multiple of one pass's."""
    cost = Cost(shape=shape, tokens=length, steps=STEPS)
    return cost.cached / cost.one_pass


def least_length(shape: Shape) -> int:
    """Return the shortest prompt for which K = 20 is at most 1.1 of one pass, by operations."""
    return next(length for length in range(1, 100_000) if counted(shape, length) <= LIMIT)


def measured(backbone: Backbone, length: int, *, repeats: int) -> dict[str, float]:
    """Run texts of one length both ways in turns, and return medians in seconds."""
    rng, count = np.random.default_rng(0), max(1, POSITIONS // length)
    prompts: Sequence[TokenIds] = [rng.integers(5, len(backbone.table), size=length) for _ in range(count)]
    ways = {"one_pass": (Engine(one_pass(backbone)), FixedSteps(0)), "refined": (Engine(backbone), FixedSteps(STEPS))}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, (engine, halt) in ways.items():
            begin = time.perf_counter()
            engine_loop(engine, prompts, halt)
            taken[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(own[1:]) for name, own in taken.items()}  # the first turn warms up
    ratios = [slow / fast for slow, fast in zip(taken["refined"][1:], taken["one_pass"][1:], strict=True)]
    return {**medians, "texts": count, "ratio": medians["refined"] / medians["one_pass"], "low": min(ratios), "high": max(ratios)}


def model_of(name: str, *, repeats: int) -> dict[str, Any]:
    """Count and measure a model at every length."""
    backbone = LOADERS[name]()
    shape = shape_of_backbone(backbone)
    rows = [
        {"tokens": length, "counted": counted(shape, length), **measured(backbone, length, repeats=repeats)}
        for length in tqdm(LENGTHS[name], desc=name)
    ]
    return {"least_tokens_counted": least_length(shape), "rows": rows}


def table_6(papers: Path) -> list[dict[str, Any]]:
    """Return the paper's table 6 beside what the configuration alone gives: operations of linear layers, and weights with the cache."""
    theirs = json.loads((papers / "tables.json").read_text(encoding="utf-8"))["gircse_table6_cost"]
    cells = [("one pass", 0, theirs["causal_eos"])]
    cells += [(way, int(k), own) for way in ("gircse_no_cache", "gircse_cache") for k, own in theirs[way].items()]
    rows = []
    for way, steps, own in cells:
        for tokens, flops, memory in zip((512, 1024, 2048), own["flops"], own["memory"], strict=True):
            cost = Cost(shape=shape_of(PAPER["Mistral-7B"]), tokens=tokens, steps=steps)
            ours = {"one pass": cost.linear_one_pass, "gircse_no_cache": cost.linear_recomputed, "gircse_cache": cost.linear_cached}[way]
            kept = cost.weights_memory + (cost.cache_memory if way == "gircse_cache" else 0)
            row: dict[str, Any] = {"way": way, "steps": steps, "tokens": tokens, "paper_tflops": flops, "tflops": ours / 1e12}
            rows.append({**row, "paper_memory": memory, "memory_gib": kept / 2**30})
    return rows


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--papers", type=Path, default=DATA.parent / "papers", help="folder with the paper's tables.json")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    paper = {}
    for name, config in PAPER.items():
        shape = shape_of(config)
        rows = [{"tokens": length, "counted": counted(shape, length)} for length in COUNTED]
        paper[name] = {"least_tokens_counted": least_length(shape), "rows": rows}
    FOLDER.mkdir(parents=True, exist_ok=True)
    if (args.papers / "tables.json").is_file():
        replace_text(FOLDER / "table6.json", json.dumps(table_6(args.papers)) + "\n")
    for name in args.models:
        if is_kept(FOLDER / f"{name}.json", again=args.again):
            continue
        found = {
            "benchmark": "generation_cost",
            "model": name,
            "machine": machine(),
            **model_of(name, repeats=args.repeats),
            "paper": paper,
        }
        replace_text(FOLDER / f"{name}.json", json.dumps(found) + "\n")
        print(f"{name}.json: written", flush=True)


if __name__ == "__main__":
    main()
