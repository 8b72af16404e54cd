"""How fast is the engine, against the paper's algorithm and against the arithmetic?

    python benchmarks/throughput.py [--models mini mini-full qwen] [--repeats 3] [--threads 2] [--texts 256]

On `mini`, on `mini` with a head over its whole vocabulary, and on a random model of Qwen2.5-0.5B's shape, for queries of
mean 20 tokens and documents of mean 200, side by side:

- `causal-eos`   the engine without refinement: one pass, the unit of every ratio
- `plain`        the paper's algorithm 1 as released: padded batches of 32 in the given order, logits at all positions, no compaction
- `sorted`       the same loop with texts sorted by length and logits at the last position only
- `engine`       ours, K = 20
- `engine near 9`, `engine 4-20`   ours, with every text halting at a recorded step: 9 +- 0.5, or evenly spread over 4 to 20

The FLOP bound of a ratio to `causal-eos` is 1 + K(1 + 2|V|d/P)/N, with P the parameters of the body and N the mean prompt length.
Iteration saving is 1 - (steps done)/(20 * texts); the decode phase is the time beyond `causal-eos`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from results_file import RESULTS, machine, write
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from genembed import FixedSteps, Progress, checkpoint, source
from genembed.backbone import Backbone, SoftTokenHead
from genembed.engine import Engine
from genembed.pooling import Pooling
from genembed.refine import step
from genembed.rows import CachedRows
from genembed.settings import GIRCSE
from genembed.tokens import TokenBatch, TokenIds

STEPS = 20
MINI = "mini"
BATCH = 32
"""Batch of the plain loop, as the released evaluation uses."""


@dataclass(frozen=True)
class RecordedSteps:
    """Halts every text at a step that was fixed beforehand: a double for a rule whose outcome is known."""

    steps: Tensor
    max_steps: int = STEPS
    window: int = 0

    def __call__(self, progress: Progress) -> Bool[Tensor, "rows"]:
        """Finish a text at its recorded step."""
        return progress.step >= self.steps[progress.index]


def one_pass(backbone: Backbone) -> Backbone:
    """Return the same weights as a Causal-EOS embedder."""
    settings = replace(backbone.settings, pooling=Pooling(kind="last"), halt=FixedSteps(0))
    return Backbone(backbone.model, settings, head=backbone.trained_head)


@torch.inference_mode()
def plain_loop(backbone: Backbone, prompts: Sequence[TokenIds], *, improved: bool) -> int:
    """Run the paper's algorithm on padded batches.

    Args:
        backbone: The model.
        prompts: Texts in the given order.
        improved: Sort by length and take logits at the last position only.

    Returns:
        Steps done, over all texts.
    """
    order = sorted(prompts, key=len) if improved else list(prompts)
    for start in range(0, len(order), BATCH):
        batch = TokenBatch.pad(order[start : start + BATCH])
        rows = CachedRows(backbone, batch)
        if not improved:
            states = torch.zeros(*batch.input_ids.shape, backbone.hidden_size)
            backbone.head(states)
        progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
        for _ in range(STEPS):
            if improved:
                progress, _cosine = step(backbone, rows, progress)
            else:
                probabilities = torch.softmax(backbone.head(rows.last_hidden) / backbone.settings.temperature, dim=-1)
                rows.append(probabilities @ backbone.spoken)
                progress, _cosine = backbone.settings.pooling.advance(progress, rows.last_hidden)
    return STEPS * len(order)


def engine_loop(engine: Engine, prompts: Sequence[TokenIds], halt: Any) -> int:
    """Run our engine; return the steps done."""
    return int(sum(done.steps.sum() for done in engine.run(prompts, halt)))


def load_mini() -> Backbone:
    """Return the built-in model."""
    return checkpoint.load(source.resolve(MINI, adapter=None, preset=None, offline=True), device="cpu", dtype="float32").backbone


def load_mini_full() -> Backbone:
    """Return the built-in model with a head that speaks its whole vocabulary, as its first version did."""
    mini = load_mini()
    assert mini.trained_head is not None
    head = SoftTokenHead(mini.hidden_size, len(mini.table))
    head.dense, head.norm = mini.trained_head.dense, mini.trained_head.norm
    return Backbone(mini.model, mini.settings, head=head.eval().requires_grad_(False))


def load_qwen() -> Backbone:
    """Return a random model of Qwen2.5-0.5B's shape, with logits neither flat nor one-hot."""
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    return Backbone(model, GIRCSE)


def prompts_of(kind: str, count: int, vocab: int, limit: int) -> list[TokenIds]:
    """Draw prompts whose lengths are spread as real ones are: queries around 20 tokens, documents around 200."""
    rng = np.random.default_rng(0)
    mean, spread = {"queries": (20, 8), "documents": (200, 80)}[kind]
    lengths = np.clip(rng.normal(mean, spread, count).round(), 4, limit).astype(int)
    return [rng.integers(5, vocab, size=length) for length in lengths]


def flop_bound(backbone: Backbone, mean_length: float) -> float:
    """Return the least ratio of K = 20 to one pass, by arithmetic alone."""
    body = sum(
        p.numel() for name, p in backbone.base.named_parameters() if p.dim() == 2 and "embedding" not in name and "embed" not in name
    )
    vocabulary = 2 * backbone.spoken.numel()
    return 1 + STEPS * (1 + vocabulary / body) / mean_length


def seconds_of(run: Callable[[], int]) -> tuple[float, int]:
    """Time one run."""
    start = time.perf_counter()
    steps = run()
    return time.perf_counter() - start, steps


def compare(name: str, loader: Callable[[], Backbone], kind: str, count: int, repeats: int) -> dict[str, Any]:
    """Time every variant in turn, `repeats` times, and print a table.

    The loops run on a model of their own: the engine packs the weights of its model.
    """
    backbone, stock = loader(), loader()
    rng = np.random.default_rng(1)
    prompts = prompts_of(kind, count, len(backbone.table), 256)
    mean_length = float(np.mean([len(ids) for ids in prompts]))
    engine, single = Engine(backbone), Engine(one_pass(backbone))
    near_nine = RecordedSteps(torch.from_numpy(np.clip(rng.normal(9, 0.5, count).round(), 1, STEPS).astype(int)))
    spread = RecordedSteps(torch.from_numpy(rng.integers(4, STEPS + 1, count)))
    variants: dict[str, Callable[[], int]] = {
        "causal-eos": lambda: engine_loop(single, prompts, FixedSteps(0)),
        "plain": lambda: plain_loop(stock, prompts, improved=False),
        "sorted": lambda: plain_loop(stock, prompts, improved=True),
        "engine": lambda: engine_loop(engine, prompts, FixedSteps(STEPS)),
        "engine near 9": lambda: engine_loop(engine, prompts, near_nine),
        "engine 4-20": lambda: engine_loop(engine, prompts, spread),
    }
    for warm_up in (backbone, stock):
        plain_loop(warm_up, prompts[:4], improved=True)
    engine_loop(engine, prompts[:BATCH], FixedSteps(2))
    engine_loop(single, prompts[:BATCH], FixedSteps(0))
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    steps: dict[str, int] = {}
    for _ in range(repeats):
        for variant, run in variants.items():
            seconds, steps[variant] = seconds_of(run)
            times[variant].append(seconds)
    return report(name, kind, count, mean_length, flop_bound(backbone, mean_length), times, steps)


def report(
    name: str, kind: str, count: int, mean_length: float, bound: float, times: dict[str, list[float]], steps: dict[str, int]
) -> dict[str, Any]:
    """Print one comparison and return it."""
    median = {variant: statistics.median(values) for variant, values in times.items()}
    unit, full = median["causal-eos"], median["engine"]
    print(f"\n{name}, {count} {kind}, mean {mean_length:.0f} tokens; FLOP bound of K={STEPS} to causal-eos: {bound:.2f}")
    heads = (("ms/text", 9), ("spread", 8), ("iterations", 12), ("/causal-eos", 13), ("plain/this", 12), ("decode/iteration saving", 50))
    print(f"  {'variant':<15}" + "".join(f"{head:>{width}}" for head, width in heads))
    rows = {}
    for variant, values in times.items():
        saving = None
        if variant.startswith("engine ") and steps["engine"]:
            iterations = 1 - steps[variant] / steps["engine"]
            decode = (full - median[variant]) / (full - unit)
            saving = {
                "iterations": iterations,
                "decode": decode,
                "share": decode / iterations,
                "wall_clock": 1 - median[variant] / full,
                "ceiling": iterations * (full - unit) / full,
            }
        rows[variant] = {
            "seconds": values,
            "ms_per_text": 1e3 * median[variant] / count,
            "iterations": steps[variant],
            "to_causal_eos": median[variant] / unit,
            "plain_over_this": median["plain"] / median[variant],
            "saving": saving,
        }
        note = (
            "{decode:.0%} / {iterations:.0%} = {share:.2f}, wall {wall_clock:.0%} of at most {ceiling:.0%}".format(**saving)
            if saving
            else ""
        )
        spread = (max(values) - min(values)) / median[variant]
        print(
            f"  {variant:<15}{rows[variant]['ms_per_text']:>9.2f}{spread:>8.0%}{steps[variant]:>12,}{rows[variant]['to_causal_eos']:>13.2f}"
            f"{rows[variant]['plain_over_this']:>12.2f}{note:>50}",
            flush=True,
        )
    return {"model": name, "kind": kind, "texts": count, "mean_tokens": mean_length, "flop_bound": bound, "variants": rows}


def main() -> None:
    """Run the comparisons and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini", "qwen"], choices=["mini", "mini-full", "qwen"])
    parser.add_argument("--kinds", nargs="+", default=["queries", "documents"], choices=["queries", "documents"])
    parser.add_argument("--texts", type=int, default=None, help="texts in a run (default: 512 for mini, 96 for qwen)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    loaders = {"mini": (load_mini, 512), "mini-full": (load_mini_full, 512), "qwen": (load_qwen, 96)}
    comparisons = []
    for model in arguments.models:
        loader, count = loaders[model]
        for kind in arguments.kinds:
            comparisons.append(compare(model, loader, kind, arguments.texts or count, arguments.repeats))
    path = write(
        "throughput-" + "-".join(arguments.models),
        {"dtype": "float32", "steps": STEPS, "comparisons": comparisons},
        folder=arguments.output,
    )
    print(f"\nwritten: {path}")
    print(json.dumps({f"{c['model']} {c['kind']}": round(c["variants"]["engine"]["plain_over_this"], 2) for c in comparisons}))


if __name__ == "__main__":
    main()
