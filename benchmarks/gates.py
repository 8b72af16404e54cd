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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves import STEPS, Curves, EvaluationSet
from evaluation_data import DATA, few_shot_accuracy, json_lines, ndcg_at_10, retrieval, spearman
from results_file import RESULTS, write

import genembed
from genembed import ConvergeStop, Embedder, HaltingRule
from genembed.refine import step
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch

THRESHOLDS = (0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)


def development_sets(data: Path, *, small: bool) -> list[EvaluationSet]:
    """Read the three development sets."""
    share = 0.3 if small else 1.0
    pairs = [row for row in json_lines(data / "sts" / "stsb.jsonl") if row["split"] == "dev"]
    pairs = pairs[: int(len(pairs) * share)]
    gold = np.asarray([row["score"] for row in pairs])
    sts = EvaluationSet(
        "stsb dev",
        {"first": [row["sentence1"] for row in pairs], "second": [row["sentence2"] for row in pairs]},
        lambda v: spearman((v["first"] * v["second"]).sum(-1), gold),
    )
    scifact = retrieval(data / "retrieval" / "scifact", qrels="qrels_train.tsv").sample(int(1000 * share), seed=0)
    search = EvaluationSet(
        "scifact train",
        {"queries": list(scifact.queries.values()), "documents": list(scifact.documents.values())},
        lambda v: float(ndcg_at_10(v["queries"] @ v["documents"].T, scifact).mean()),
    )
    texts, labels = banking(data, per_label=24 if small else 36)
    intents = EvaluationSet("banking77 train", {"texts": texts}, lambda v: few_shot_accuracy(v["texts"], labels, shots=16, seed=0))
    return [sts, search, intents]


def banking(data: Path, *, per_label: int) -> tuple[list[str], list[str]]:
    """Draw some training texts of every Banking77 intent."""
    rows = [row for row in json_lines(data / "classification" / "banking77.jsonl") if row["split"] == "train"]
    chosen: dict[str, list[str]] = {}
    for i in np.random.default_rng(0).permutation(len(rows)):
        chosen.setdefault(rows[i]["label"], []).append(rows[i]["text"])
    pairs = [(text, label) for label, texts in sorted(chosen.items()) for text in texts[:per_label]]
    return [text for text, _ in pairs], [label for _, label in pairs]


def thresholds(sets: list[Curves], rule: HaltingRule) -> dict[str, dict[str, float]]:
    """Replay other thresholds of a ConvergeStop rule: what each costs against K = 20, and the steps it takes."""
    if not isinstance(rule, ConvergeStop):
        return {}
    found = {}
    for threshold in THRESHOLDS:
        halted = [one.halted(replace(rule, threshold=threshold)) for one in sets]
        loss = [score - one.at(STEPS) for one, (score, _) in zip(sets, halted, strict=True)]
        found[str(threshold)] = {"worst": min(loss), "mean": float(np.mean(loss)), "mean_steps": float(np.mean([k for _, k in halted]))}
    return found


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
    sets = [one.embed(model) for one in development_sets(arguments.data, small=arguments.small)]
    values: dict[str, Any] = {"model": arguments.model, "rule": repr(model.settings.halt), "small": arguments.small, "sets": {}}
    for one in sets:
        halted, mean_steps = one.halted(model.settings.halt)
        curve = [one.at(k) for k in range(STEPS + 1)]
        values["sets"][one.of.name] = {"curve": curve, "halted": halted, "mean_steps": mean_steps}
        shown = "  ".join(f"K={k} {curve[k]:.2f}" for k in (0, 1, 2, 5, 10, 15, 20))
        print(f"{one.of.name:<16} {shown}  {model.settings.halt}: {halted:.2f} at mean k* {mean_steps:.1f}", flush=True)
    values["thresholds"] = thresholds(sets, model.settings.halt)
    for threshold, row in values["thresholds"].items():
        print(f"threshold {threshold}: worst {row['worst']:+.2f} to K = {STEPS}, mean {row['mean']:+.2f}, mean k* {row['mean_steps']:.1f}")
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
