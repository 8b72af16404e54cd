"""Does the instruction decide what a model says to itself, and what its embedding is about? Claims G8 and G9 of docs/reproduction.md.

    python benchmarks/instructions.py [--model mini] [--untrained FOLDER] [--texts 1200] [--said 100] [--again] [--data ../shared/data]

Tweets with two labels, their topic and the author's stance (SemEval 2016, task 6).

- G9: texts are embedded under an instruction for each aspect, and without one, and clustered into as many clusters as the aspect has
  labels: V-measure on random halves of the texts, the same halves for every K and every instruction.
- G8: the tokens that a text is answered with, the likeliest five of each of 20 steps, under an instruction, under a paraphrase of it,
  and under the other aspect's instruction: Jaccard overlap of the sets. A model whose soft tokens follow the instruction says more
  of the same under the paraphrase. Of the trained model, and of one that was never trained to generate.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
from curves import STEPS, curve_of
from evaluation_data import DATA, json_lines
from jaxtyping import Float
from results_file import RESULTS, is_kept, machine
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from sklearn.metrics import v_measure_score  # type: ignore[import-untyped]
from tqdm import tqdm

import genembed
from genembed import Embedder
from genembed.analyse.intervals import Bootstrap, estimate
from genembed.spoken import spoken_tokens
from genembed.train.durable import replace_text

FOLDER = RESULTS / "instructions"
COLUMNS = {"topic": "label", "stance": "stance"}
"""Column of each aspect's labels."""
INSTRUCTIONS = {"topic": "Represent the text based on the topic.", "stance": "Represent the text based on the stance."}
"""Of each aspect, after those of the paper's table 12."""
PARAPHRASES = {"topic": "Identify what subject this text is about.", "stance": "Identify whether this text is in favor or against."}
NONE = "none"
SHOWN = (0, 1, 3, 5, 10, STEPS)
HALVES, TOP = 40, 5


@dataclass(frozen=True)
class Clusterings:
    """V-measure in percent on every half, by aspect, instruction and K."""

    values: dict[tuple[str, str, int], Float[np.ndarray, "halves"]]

    def means(self) -> list[dict[str, Any]]:
        """Return the mean over halves of each."""
        return [
            {"aspect": aspect, "instruction": told, **{str(k): float(self.values[aspect, told, k].mean()) for k in SHOWN}}
            for aspect, told in product(COLUMNS, (NONE, *INSTRUCTIONS))
        ]

    def harmonic(self, steps: int, told: dict[str, str]) -> Float[np.ndarray, "halves"]:
        """Return the harmonic mean over the aspects, each under an instruction."""
        both = np.stack([self.values[aspect, name, steps] for aspect, name in told.items()], axis=1)
        return np.asarray([harmonic_mean(own) for own in both.tolist()])

    def differences(self) -> list[dict[str, Any]]:
        """Return what claim G9 is about: refinement under the instruction, and the instruction at full refinement."""
        own, bare = {aspect: aspect for aspect in COLUMNS}, dict.fromkeys(COLUMNS, NONE)
        swapped = dict(zip(COLUMNS, reversed(COLUMNS), strict=True))
        pairs = {
            f"each aspect under its instruction, K = {STEPS} to K = 0": (self.harmonic(STEPS, own), self.harmonic(0, own)),
            f"K = {STEPS}, under its instruction to none": (self.harmonic(STEPS, own), self.harmonic(STEPS, bare)),
            f"K = {STEPS}, under its instruction to the other aspect's": (self.harmonic(STEPS, own), self.harmonic(STEPS, swapped)),
        }
        return [{"what": what, **_interval(first - second)} for what, (first, second) in pairs.items()]


def clustered(model: Embedder, rows: list[dict[str, str]]) -> Clusterings:
    """Cluster under every instruction at every K."""
    texts = [row["text"] for row in rows]
    told = {NONE: None, **INSTRUCTIONS}
    curves = {name: curve_of(model, texts, instruction=instruction) for name, instruction in told.items()}
    names = {aspect: np.asarray([row[column] for row in rows]) for aspect, column in COLUMNS.items()}
    cases = list(product(COLUMNS, told, SHOWN))
    return Clusterings({case: _halves(curves[case[1]][:, case[2]], names[case[0]]) for case in tqdm(cases, desc="clustering", delay=1)})


def _halves(vectors: Float[np.ndarray, "texts hidden"], labels: np.ndarray) -> Float[np.ndarray, "halves"]:
    found = []
    for half in range(HALVES):
        chosen = np.random.default_rng(half).permutation(len(labels))[: len(labels) // 2]
        kept = KMeans(len(set(labels)), n_init=3, random_state=half).fit_predict(vectors[chosen])
        found.append(100 * v_measure_score(labels[chosen], kept))
    return np.asarray(found)


def _interval(halves: Float[np.ndarray, "halves"]) -> dict[str, float]:
    """Return the mean with the range of 95 % of the halves: wider than that of the whole, as each has half of the texts."""
    low, high = np.quantile(halves, [0.025, 0.975])
    return {"value": float(halves.mean()), "low": float(low), "high": float(high)}


def answered(model: Embedder, texts: list[str]) -> list[dict[str, Any]]:
    """Compare the tokens under a paraphrase of an instruction with those under the other one."""
    told = [*INSTRUCTIONS.values(), *PARAPHRASES.values()]
    said = {words: [_said(model, text, words) for text in tqdm(texts, desc="speaking", delay=1)] for words in told}
    draws, found = Bootstrap.of(len(texts), seed=0), []
    for aspect, other in zip(COLUMNS, reversed(COLUMNS), strict=True):
        same = _overlaps(said[INSTRUCTIONS[aspect]], said[PARAPHRASES[aspect]])
        # Against both wordings of the other aspect, so that the wording is not what differs.
        different = np.mean([_overlaps(said[INSTRUCTIONS[aspect]], said[words[other]]) for words in (INSTRUCTIONS, PARAPHRASES)], axis=0)
        lead = estimate(draws.means(same - different)).scaled(100.0)
        found.append({"aspect": aspect, "paraphrase": 100 * float(same.mean()), "other": 100 * float(different.mean()), **vars(lead)})
    return found


def _said(model: Embedder, text: str, instruction: str) -> set[str]:
    steps = spoken_tokens(model, text, instruction=instruction, steps=STEPS, top=TOP)
    return {word.token for best in steps for word in best}


def _overlaps(first: list[set[str]], second: list[set[str]]) -> Float[np.ndarray, "texts"]:
    return np.asarray([len(a & b) / len(a | b) for a, b in zip(first, second, strict=True)])


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--untrained", help="the same model before training; left out if not given")
    parser.add_argument("--texts", type=int, default=1_200)
    parser.add_argument("--said", type=int, default=100, help="texts whose soft tokens are compared")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--again", action="store_true", help="measure anew what has a result file")
    args = parser.parse_args()
    path = FOLDER / f"{Path(args.model).name}.json"
    if is_kept(path, again=args.again):
        return
    rows: list[dict[str, str]] = list(json_lines(args.data / "clustering" / "tweet_topic_stance.jsonl"))
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[: args.texts]]
    model, said = genembed.load(args.model), [row["text"] for row in rows[: args.said]]
    found = clustered(model, rows)
    result: dict[str, Any] = {
        "benchmark": "instructions",
        "machine": machine(),
        "clustered": {"texts": len(rows), "halves": HALVES, "v_measure": found.means(), "differences": found.differences()},
        "said": {"texts": len(said), "trained": answered(model, said)},
    }
    if args.untrained:
        result["said"]["untrained"] = answered(genembed.load(args.untrained), said)
    FOLDER.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(result) + "\n")
    print(f"{path.name}: written")


if __name__ == "__main__":
    main()
