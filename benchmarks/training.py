"""How much cheaper is a training update than the released code's, in time and in memory?

    python benchmarks/training.py [--shapes small qwen] [--updates 3] [--threads 2] [--prompt 128] [--steps 5]

One update of LoRA (rank 16, all linear layers) on 2 queries and 4 passages of `--prompt` tokens, K = `--steps`, loss of every
step and regulariser, on random models: `small` has 6 layers, d = 384, |V| = 16,384; `qwen` the shape of Qwen2.5-0.5B. Each
variant runs in a process of its own, one after another, warm, and reports the median update and its peak memory above what the
loaded model takes:

- `released`          K + 1 passes over the whole sequence without a cache, logits at all positions, hidden states of all layers,
                      Transformers' gradient checkpointing; queries and passages one after the other
- `no checkpointing`  the same without gradient checkpointing
- `last logits`       that, with logits at the last position only
- `cache`             our reference loop: Transformers' cache, padded batches
- `ours`              one unpadded pass over all texts, steps through kept keys and values, soft tokens computed again in the
                      backward pass
- `ours, layers`      that, with every layer computed again in the backward pass

The FLOP ceiling of a variant's speed-up is the ratio of the arithmetic that `released` and it must do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from results_file import RESULTS, machine, write
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from genembed.backbone import Backbone
from genembed.refine import refine
from genembed.settings import GIRCSE
from genembed.tokens import TokenBatch, TokenIds
from genembed.train.losses import refinement_regulariser, stepwise_contrastive
from genembed.train.model import TrainableEmbedder
from genembed.train.trajectories import trajectories

QUERIES, PASSAGES = 2, 4
RELEASED = "released"

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
        "vocab_size": 16_384,
    },
    "qwen": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What every variant learns from."""

    shape: str
    prompt: int
    steps: int
    updates: int
    threads: int

    def prompts(self) -> list[TokenIds]:
        """Return texts whose lengths vary by a quarter around the mean, queries first."""
        rng = np.random.default_rng(0)
        lengths = rng.integers(self.prompt * 3 // 4, self.prompt * 5 // 4 + 1, QUERIES + PASSAGES)
        return [rng.integers(5, SHAPES[self.shape]["vocab_size"], size=length) for length in lengths]


@dataclass(frozen=True)
class Variant:
    """One way to compute the trajectories, and what it must calculate."""

    vectors: Callable[[TrainableEmbedder, list[TokenIds], int], Tensor]
    checkpointing: bool
    passes: Callable[[Workload], tuple[float, float]]
    """Positions that go through the body, and through one product with the vocabulary, in a forward pass of one text."""


def released(all_logits: bool) -> Callable[[TrainableEmbedder, list[TokenIds], int], Tensor]:
    """Return the released code's loop."""

    def refined(model: TrainableEmbedder, prompts: list[TokenIds], steps: int) -> Tensor:
        backbone, batch = model.backbone, TokenBatch.pad(prompts)
        embeddings, mask, states = backbone.embed(batch.input_ids), batch.mask, []
        for _ in range(steps + 1):
            output = backbone.model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                output_hidden_states=True,
                use_cache=False,
                logits_to_keep=0 if all_logits else 1,
            )
            states.append(output.hidden_states[-1][:, -1])
            token = torch.softmax(output.logits[:, -1], dim=-1) @ backbone.table
            embeddings = torch.cat([embeddings, token[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        generated = torch.stack(states[1:], dim=1)
        means = generated.cumsum(1) / torch.arange(1, steps + 1)[:, None]
        return torch.nn.functional.normalize(means, dim=-1)

    return lambda model, prompts, steps: torch.cat([refined(model, prompts[:QUERIES], steps), refined(model, prompts[QUERIES:], steps)])


def through_cache(model: TrainableEmbedder, prompts: list[TokenIds], steps: int) -> Tensor:
    """Refine with the reference loop."""
    return refine(model.backbone, TokenBatch.pad(prompts), steps=steps)


def ours(model: TrainableEmbedder, prompts: list[TokenIds], steps: int) -> Tensor:
    """Refine as our training does."""
    return trajectories(model.backbone, prompts, steps=steps).vectors


def _whole(load: Workload) -> float:
    return float(sum(load.prompt + k for k in range(load.steps + 1)))


VARIANTS: dict[str, Variant] = {
    RELEASED: Variant(released(True), True, lambda load: (_whole(load), _whole(load) + load.steps + 1)),
    "no checkpointing": Variant(released(True), False, lambda load: (_whole(load), _whole(load) + load.steps + 1)),
    "last logits": Variant(released(False), False, lambda load: (_whole(load), 2 * (load.steps + 1))),
    "cache": Variant(through_cache, False, lambda load: (load.prompt + load.steps, 2 * load.steps)),
    "ours": Variant(ours, False, lambda load: (load.prompt + load.steps, 2 * load.steps)),
    "ours, layers": Variant(ours, True, lambda load: (load.prompt + load.steps, 2 * load.steps)),
}


def flops(name: str, load: Workload) -> float:
    """Return the arithmetic of one update and text: forward, once more where layers are checkpointed, and the gradient of the inputs."""
    body_positions, vocabulary_positions = VARIANTS[name].passes(load)
    shape = SHAPES[load.shape]
    d, kv = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    body = shape["num_hidden_layers"] * (2 * d * d + 2 * d * kv + 3 * d * shape["intermediate_size"])
    passes = 3 if VARIANTS[name].checkpointing else 2
    # Our soft tokens are computed once more in the backward pass.
    again = 3 if name in ("cache", "ours", "ours, layers") else 2
    return float(2 * (passes * body_positions * body + again * vocabulary_positions * d * shape["vocab_size"]))


def build(load: Workload, *, checkpointing: bool) -> TrainableEmbedder:
    """Return a random model with a LoRA adapter that is not zero."""
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[load.shape], tie_word_embeddings=True, max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    backbone = Backbone(model, GIRCSE)
    adapter = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    embedder = TrainableEmbedder(backbone, None, None, adapter)  # type: ignore[arg-type]
    if checkpointing:
        embedder.checkpoint_layers()
    return embedder.train()


def update(model: TrainableEmbedder, load: Workload, variant: Variant, optimizer: torch.optim.Optimizer) -> float:
    """Learn from the batch once; return the loss."""
    vectors = variant.vectors(model, load.prompts(), load.steps)
    losses = stepwise_contrastive(vectors[:QUERIES], vectors[QUERIES:], temperature=0.02, positives=torch.arange(QUERIES))
    loss = losses.mean() + refinement_regulariser(losses)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def measure(name: str, load: Workload, results: Any) -> None:
    """Run one variant; called in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(load.threads)
    variant = VARIANTS[name]
    model = build(load, checkpointing=variant.checkpointing)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, loss = [], 0.0
    for number in range(load.updates + 1):
        start = time.perf_counter()
        loss = update(model, load, variant, optimizer)
        if number:  # the first one warms up
            seconds.append(time.perf_counter() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results.put({"seconds": seconds, "peak_mib": peak, "loss": loss})


def compare(load: Workload) -> dict[str, Any]:
    """Run all variants in turn and print their table."""
    context = multiprocessing.get_context("spawn")
    rows: dict[str, Any] = {}
    print(f"\n{load.shape}: {QUERIES} queries, {PASSAGES} passages, {load.prompt} tokens each, K={load.steps}")
    heads = (
        ("s/update", 10),
        ("spread", 8),
        ("texts/s", 9),
        ("faster", 8),
        ("ceiling", 9),
        ("peak MiB", 10),
        ("of released", 13),
        ("loss", 9),
    )
    print(f"  {'variant':<18}" + "".join(f"{head:>{width}}" for head, width in heads))
    for name in VARIANTS:
        queue = context.Queue()
        process = context.Process(target=measure, args=(name, load, queue))
        process.start()
        row = queue.get()
        process.join()
        median = statistics.median(row["seconds"])
        first = rows.get(RELEASED, {"median": median, "peak_mib": row["peak_mib"]})
        rows[name] = {
            **row,
            "median": median,
            "texts_per_second": (QUERIES + PASSAGES) / median,
            "faster": first["median"] / median,
            "ceiling": flops(RELEASED, load) / flops(name, load),
            "memory": row["peak_mib"] / first["peak_mib"],
        }
        spread = (max(row["seconds"]) - min(row["seconds"])) / median
        print(
            f"  {name:<18}{median:>10.2f}{spread:>8.0%}{rows[name]['texts_per_second']:>9.2f}{rows[name]['faster']:>8.2f}"
            f"{rows[name]['ceiling']:>9.2f}{row['peak_mib']:>10.0f}{rows[name]['memory']:>13.2f}{row['loss']:>9.4f}",
            flush=True,
        )
    return {"shape": load.shape, "prompt": load.prompt, "steps": load.steps, "variants": rows}


def main() -> None:
    """Run the comparisons and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small"], choices=list(SHAPES))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    comparisons = [compare(Workload(shape, options.prompt, options.steps, options.updates, options.threads)) for shape in options.shapes]
    path = write("training", {"dtype": "float32", "comparisons": comparisons}, folder=options.output)
    print(f"\nwritten: {path}")
    print(json.dumps({c["shape"]: {name: round(row["faster"], 2) for name, row in c["variants"].items()} for c in comparisons}))


if __name__ == "__main__":
    main()
