"""Measure the gates of the built-in model on development sets: does refinement earn its place?

    python benchmarks/gates.py [--model mini] [--data ../shared/data]

One pass at K = 20 gives every z_k, so the whole curve from K = 0 to 20 and the halting rule are scored on the same vectors.
Development sets: STS-B dev; SciFact's training queries over their documents and 1,000 others; Banking77's training texts (16
shots of each intent, tested on 20 others). The gates (design of the built-in model):

1. K = 20 is not below K = 0 by more than 0.5 on any set, and above it in mean.
2. More than 30 % distinct likeliest soft tokens over texts.
3. The halting rule is within 0.3 of K = 20.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation_data import DATA, few_shot_accuracy, json_lines, ndcg_at_10, retrieval, spearman
from results_file import RESULTS, write

import genembed
from genembed import Embedder, FixedSteps
from genembed.halting import HaltingRule
from genembed.refine import step
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch

STEPS = 20

Curve = np.ndarray
"""Vectors of one set of texts at K = 0 .. 20: [texts, 21, hidden]."""


def curve_of(model: Embedder, texts: list[str]) -> Curve:
    """Embed texts once and keep every z_k, z_0 included."""
    start = model.refine(texts, halt=FixedSteps(0)).vectors
    trajectory = model.refine(texts, halt=FixedSteps(STEPS), keep_trajectory=True).trajectory
    assert trajectory is not None
    return np.concatenate([start[:, None], trajectory], axis=1)


def halting_steps(curve: Curve, rule: HaltingRule) -> np.ndarray:
    """Replay a halting rule on kept trajectories: the step each text would have stopped at."""
    texts = len(curve)
    cosines = np.einsum("tkd,tkd->tk", curve[:, 1:-1], curve[:, 2:])
    steps = np.full(texts, rule.max_steps)
    for k in range(rule.max_steps, 0, -1):
        window = np.full((texts, rule.window), -1.0)
        measured = cosines[:, max(0, k - 1 - rule.window) : k - 1]
        if measured.shape[1]:
            window[:, -measured.shape[1] :] = measured
        zeros = torch.zeros(texts)
        progress = genembed.Progress(zeros, torch.full((texts,), k), zeros[:, None], zeros, zeros[:, None], torch.from_numpy(window))
        steps[rule(progress).numpy()] = k
    return steps


class DevelopmentSet:
    """Texts, and a score for any choice of one vector for each."""

    def __init__(self, name: str, model: Embedder, texts: dict[str, list[str]], score: Callable[[dict[str, np.ndarray]], float]) -> None:
        self.name, self.score = name, score
        self.curves = {role: curve_of(model, list(values)) for role, values in texts.items()}

    def at(self, steps: int) -> float:
        """Score at a fixed K."""
        return self.score({role: curve[:, steps] for role, curve in self.curves.items()})

    def halted(self, rule: HaltingRule) -> tuple[float, float]:
        """Score under a halting rule, and its mean k*."""
        chosen, counts = {}, []
        for role, curve in self.curves.items():
            steps = halting_steps(curve, rule)
            chosen[role] = curve[np.arange(len(curve)), steps]
            counts.append(steps)
        return self.score(chosen), float(np.concatenate(counts).mean())


def development_sets(model: Embedder, data: Path, *, small: bool) -> list[DevelopmentSet]:
    """Embed the three development sets."""
    share = 0.3 if small else 1.0
    pairs = [row for row in json_lines(data / "sts" / "stsb.jsonl") if row["split"] == "dev"]
    pairs = pairs[: int(len(pairs) * share)]
    gold = np.asarray([row["score"] for row in pairs])
    sts = DevelopmentSet(
        "stsb dev",
        model,
        {"first": [row["sentence1"] for row in pairs], "second": [row["sentence2"] for row in pairs]},
        lambda v: spearman((v["first"] * v["second"]).sum(-1), gold),
    )
    scifact = retrieval(data / "retrieval" / "scifact", qrels="qrels_train.tsv").sample(int(1000 * share), seed=0)
    search = DevelopmentSet(
        "scifact train",
        model,
        {"queries": list(scifact.queries.values()), "documents": list(scifact.documents.values())},
        lambda v: float(ndcg_at_10(v["queries"] @ v["documents"].T, scifact).mean()),
    )
    texts, labels = banking(data, per_label=24 if small else 36)
    intents = DevelopmentSet("banking77 train", model, {"texts": texts}, lambda v: few_shot_accuracy(v["texts"], labels, shots=16, seed=0))
    return [sts, search, intents]


def banking(data: Path, *, per_label: int) -> tuple[list[str], list[str]]:
    """Draw some training texts of every Banking77 intent."""
    rows = [row for row in json_lines(data / "classification" / "banking77.jsonl") if row["split"] == "train"]
    chosen: dict[str, list[str]] = {}
    for i in np.random.default_rng(0).permutation(len(rows)):
        chosen.setdefault(rows[i]["label"], []).append(rows[i]["text"])
    pairs = [(text, label) for label, texts in sorted(chosen.items()) for text in texts[:per_label]]
    return [text for text, _ in pairs], [label for _, label in pairs]


@torch.inference_mode()
def distinct_tokens(model: Embedder, texts: list[str]) -> list[float]:
    """Return, for each step, the number of different likeliest tokens over the number of texts."""
    backbone, likeliest = model.backbone, []
    for start in range(0, len(texts), 50):
        batch = TokenBatch.pad(model.tokenizer(texts[start : start + 50]).ids, device=backbone.device)
        rows = CachedRows(backbone, batch)
        progress = model.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
        tokens = []
        for _ in range(STEPS):
            tokens.append(backbone.head(rows.last_hidden).argmax(-1))
            progress, _cosine = step(backbone, rows, progress)
        likeliest.append(torch.stack(tokens, dim=1))
    table = torch.cat(likeliest)
    return [len(set(table[:, k].tolist())) / len(table) for k in range(STEPS)]


def main() -> None:
    """Measure, print and write the gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--small", action="store_true", help="a third of the data, for a first look")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = genembed.load(arguments.model)
    sets = development_sets(model, arguments.data, small=arguments.small)
    values: dict[str, Any] = {"model": arguments.model, "rule": repr(model.settings.halt), "small": arguments.small, "sets": {}}
    for one in sets:
        halted, mean_steps = one.halted(model.settings.halt)
        curve = [one.at(k) for k in range(STEPS + 1)]
        values["sets"][one.name] = {"curve": curve, "halted": halted, "mean_steps": mean_steps}
        shown = "  ".join(f"K={k} {curve[k]:.2f}" for k in (0, 1, 2, 5, 10, 15, 20))
        print(f"{one.name:<16} {shown}  {model.settings.halt}: {halted:.2f} at mean k* {mean_steps:.1f}", flush=True)
    texts = [row["query"] for row in json_lines(arguments.data / "train" / "clapnq_train.jsonl")][:300]
    values["distinct_tokens"] = distinct_tokens(model, texts)
    gains = [entry["curve"][STEPS] - entry["curve"][0] for entry in values["sets"].values()]
    values["gates"] = {
        "no set loses more than 0.5": min(gains) >= -0.5,
        "K=20 above K=0 in mean": float(np.mean(gains)) > 0,
        "distinct likeliest tokens above 30 %": float(np.mean(values["distinct_tokens"])) > 0.3,
        "halting within 0.3 of K=20": all(entry["halted"] >= entry["curve"][STEPS] - 0.3 for entry in values["sets"].values()),
    }
    if not arguments.small:
        print("written:", write("gates", values, folder=arguments.output))
    print(json.dumps({"mean gain": round(float(np.mean(gains)), 3), **values["gates"]}))


if __name__ == "__main__":
    main()
