"""With which weight should the prompt's mean state stand beside the generated ones? Every weight scored on the same states.

    python benchmarks/prompt_weight.py MODEL [--data ../shared/data]

What a model generates does not depend on how it is pooled, so each text is refined once, its prompt's mean state p and its generated
states g_1 .. g_20 are kept, and z_k = unit(w p + g_1 + ... + g_k) is scored for every weight w and k, on nine sets that no result is
reported on: STS-B dev, SICK and TREC-QC training texts, STS 2013, Banking77 training texts, SciFact training queries, CISI, duplicate
questions of Quora, CLAP-NQ dev. Sets are cut to a size that two cores embed in some minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves import STEPS, EvaluationSet
from evaluation_data import DATA, Retrieval, few_shot_accuracy, json_lines, ndcg_at_10, retrieval, spearman
from gates import banking
from results_file import RESULTS, write

import genembed
from genembed import Embedder
from genembed.refine import step
from genembed.train.rows import TrainingRows

WEIGHTS = (2.0, 5.0, 10.0, 15.0, 25.0, 40.0)
SHOWN = (1, 3, 5, 10, 20)
_TOKENS = 4_096
"""Prompt tokens read at once."""


@dataclass(frozen=True, eq=False)
class States:
    """What a model makes of some texts."""

    prompt: np.ndarray
    """Mean state of the prompt, [texts, hidden]."""
    generated: np.ndarray
    """Running sums g_1 + ... + g_k, [texts, K, hidden]."""

    def pooled(self, weight: float, steps: int) -> np.ndarray:
        """Return z_k of every text."""
        total = weight * self.prompt + (self.generated[:, steps - 1] if steps else 0.0)
        return np.asarray(total / np.linalg.norm(total, axis=-1, keepdims=True))


@torch.inference_mode()
def states_of(model: Embedder, texts: list[str]) -> States:
    """Refine texts and keep their states."""
    ids, hidden = model.tokenizer(texts).ids, model.get_embedding_dimension()
    prompt = np.zeros((len(ids), hidden), dtype=np.float32)
    generated = np.zeros((len(ids), STEPS, hidden), dtype=np.float32)
    order = np.argsort([len(one) for one in ids], kind="stable")
    start = 0
    while start < len(order):
        chosen = order[start : start + max(8, _TOKENS // len(ids[order[start]]) // 2)]
        start += len(chosen)
        rows = TrainingRows(model.backbone, [ids[place] for place in chosen])
        progress = model.settings.pooling.start(torch.arange(len(chosen)), rows.last_hidden, rows.mean_hidden, window=0)
        prompt[chosen] = rows.mean_hidden.numpy()
        for k in range(STEPS):
            progress, _cosine = step(model.backbone, rows, progress)
            generated[chosen, k] = rows.last_hidden.numpy()
    return States(prompt, generated.cumsum(axis=1))


def pairs_set(name: str, rows: list[dict[str, Any]]) -> EvaluationSet:
    """Make a set of scored pairs."""
    gold = np.asarray([row["score"] for row in rows])
    texts = {"first": [row["sentence1"] for row in rows], "second": [row["sentence2"] for row in rows]}
    return EvaluationSet(name, texts, lambda v: spearman((v["first"] * v["second"]).sum(-1), gold))


def labels_set(name: str, texts: list[str], labels: list[str]) -> EvaluationSet:
    """Make a set of labelled texts."""
    return EvaluationSet(
        name, {"texts": texts}, lambda v: float(np.mean([few_shot_accuracy(v["texts"], labels, shots=16, seed=seed) for seed in range(2)]))
    )


def search_set(name: str, data: Retrieval, *, queries: int, distractors: int) -> EvaluationSet:
    """Make a retrieval set of some of its queries, over their documents and some others."""
    kept = dict(list(data.queries.items())[:queries])
    small = Retrieval(data.documents, kept, {query: data.relevant[query] for query in kept}).sample(distractors, seed=0)
    texts = {"queries": list(small.queries.values()), "documents": list(small.documents.values())}
    return EvaluationSet(name, texts, lambda v: float(ndcg_at_10(v["queries"] @ v["documents"].T, small).mean()))


def development_sets(data: Path) -> Iterator[EvaluationSet]:
    """Read the sets."""
    sts, retrieving = data / "sts", data / "retrieval"
    yield pairs_set("stsb dev", [row for row in json_lines(sts / "stsb.jsonl") if row["split"] == "dev"])
    yield pairs_set("sick train", [row for row in json_lines(sts / "sick.jsonl") if row["split"] == "train"][:1_500])
    yield pairs_set("sts13", list(json_lines(sts / "sts13.jsonl")))
    yield labels_set("banking77 train", *banking(data, per_label=26))
    questions = [row for row in json_lines(data / "classification" / "trec_qc.jsonl") if row["split"] == "train"][:1_500]
    yield labels_set("trec_qc train", [row["text"] for row in questions], [row["label"] for row in questions])
    yield search_set("scifact train", retrieval(retrieving / "scifact", qrels="qrels_train.tsv"), queries=350, distractors=800)
    yield search_set("cisi", retrieval(retrieving / "cisi"), queries=76, distractors=1_500)
    yield search_set("quora_dup", retrieval(retrieving / "quora_dup"), queries=800, distractors=1_500)
    yield search_set("clapnq_dev", retrieval(retrieving / "clapnq_dev"), queries=300, distractors=600)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = genembed.load(arguments.model)
    rows: dict[str, Any] = {}
    for one in development_sets(arguments.data):
        states = {role: states_of(model, texts) for role, texts in one.texts.items()}
        start = one.score({role: known.pooled(1.0, 0) for role, known in states.items()})
        gains = {
            weight: [one.score({role: known.pooled(weight, k) for role, known in states.items()}) - start for k in SHOWN]
            for weight in WEIGHTS
        }
        rows[one.name] = {"start": start, "gains": gains}
        print(
            f"{one.name:<16} K=0 {start:6.2f}  " + "  ".join(f"w={w:g}: {gains[w][0]:+.2f} .. {gains[w][-1]:+.2f}" for w in WEIGHTS),
            flush=True,
        )
    means = {weight: np.mean([row["gains"][weight] for row in rows.values()], axis=0).tolist() for weight in WEIGHTS}
    for weight, values in means.items():
        worst = min(row["gains"][weight][-1] for row in rows.values())
        print(
            f"w = {weight:<5g}" + "  ".join(f"K={k} {value:+.2f}" for k, value in zip(SHOWN, values, strict=True)) + f"  worst {worst:+.2f}"
        )
    name = Path(arguments.model).name
    print("written:", write(f"prompt-weight-{name}", {"model": name, "steps": SHOWN, "sets": rows, "mean": means}, folder=arguments.output))
    print(json.dumps({f"w={weight:g}": round(values[-1], 3) for weight, values in means.items()}))


if __name__ == "__main__":
    main()
