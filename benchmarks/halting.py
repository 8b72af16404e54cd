"""ConvergeStop on whole retrieval sets: the numbers of part 2 of docs/reproduction.md.

    python benchmarks/halting.py [--model mini] [--sets scifact cranfield cisi fiqa_mini] [--repeats 3] [--again] [--data ../shared/data]

Each set is analysed as `genembed analyse --halt-documents` does it: five splits of the paper's 20/80, intervals over queries, null
models, further rules. SciFact has training queries, enough for a certificate: rules are chosen on them, and measured on all test
queries.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_data import DATA
from halting_verdicts import SETS
from results_file import RESULTS, is_kept, machine

import genembed
from genembed import Embedder
from genembed.analyse.findings import Settings, find
from genembed.analyse.intervals import Bootstrap, Estimate, estimate
from genembed.analyse.report import report
from genembed.analyse.timing import seconds
from genembed.calibrate.choose import Choice, by_certificate, by_percentile
from genembed.calibrate.development import Development, develop
from genembed.calibrate.replay import halting_steps
from genembed.halting import rule_to_json
from genembed.testsets import RetrievalSet, read_retrieval_set
from genembed.train.durable import replace_text

FOLDER = RESULTS / "halting"
CERTIFIED = "scifact"
"""The set with queries beside its test: rules are chosen on those."""
DELTA = 0.1
BOUNDS = {"jaccard": 0.05, "ndcg": 0.02}
"""Loss that is certified, with probability 1 - DELTA."""


def read(folder: Path, judgements: str) -> RetrievalSet:
    """Read a set with one of its files of judgements."""
    corpus = next(path for path in (folder / "corpus.jsonl", folder / "corpus.jsonl.gz") if path.exists())
    return read_retrieval_set(corpus, folder / "queries.jsonl", folder / judgements)


def analysed(model: Embedder, data: RetrievalSet, *, repeats: int) -> dict[str, Any]:
    """Return the whole report on a set."""
    settings = Settings(halt_documents=True, repeats=repeats)
    found = find(model, data, settings, show_progress_bar=True)
    return report(found, model, data, settings).to_json()


def certified(model: Embedder, folder: Path, *, repeats: int) -> dict[str, Any]:
    """Choose rules on the training queries, and measure them on the test queries."""
    train, test = read(folder, "qrels_train.tsv"), read(folder, "qrels.tsv")
    both = RetrievalSet(test.documents, {**train.queries, **test.queries}, {**(train.relevant or {}), **(test.relevant or {})})
    assert len(both.queries) == len(train.queries) + len(test.queries), "no query develops and tests"
    development = develop(model, both, show_progress_bar=True)
    parts = np.split(np.arange(len(both.queries)), [len(train.queries)])
    chosen_on, measured_on = (development.select(part) for part in parts)
    choices = {
        **{loss: by_certificate(chosen_on, loss=loss, epsilon=bound, delta=DELTA) for loss, bound in BOUNDS.items()},  # type: ignore[arg-type]
        "percentile": by_percentile(chosen_on),
    }
    queries = list(test.queries.values())
    return {
        "development_queries": len(chosen_on),
        "test_queries": len(measured_on),
        "delta": DELTA,
        "rules": [
            {"chosen_by": name, "bound": BOUNDS.get(name), **measured(choice, measured_on), **timed(model, choice, queries, repeats)}
            for name, choice in choices.items()
        ],
    }


def measured(choice: Choice, test: Development) -> dict[str, Any]:
    """Return what a chosen rule gives on other queries, in percent."""
    steps = halting_steps(test.stability, choice.rule)
    rows, last = np.arange(len(test)), steps - 1
    draws = Bootstrap.of(len(test), seed=0)
    assert test.ndcg is not None
    return {
        "rule": rule_to_json(choice.rule),
        "mean_steps": float(steps.mean()),
        "savings": 100 * float(1 - steps.mean() / test.max_steps),
        "jaccard_loss": _interval(estimate(draws.means(1 - test.jaccard[rows, last]))),
        "ndcg_loss": _interval(estimate(draws.means(test.ndcg[:, -1] - test.ndcg[rows, last]))),
    }


def _interval(found: Estimate) -> dict[str, float]:
    shown = found.scaled(100.0)
    return {"value": shown.value, "low": shown.low, "high": shown.high}


def timed(model: Embedder, choice: Choice, queries: list[str], repeats: int) -> dict[str, Any]:
    """Return the share of the seconds of full refinement that the rule saves, and the share that could be saved."""
    steps, instruction = model.settings.halt.max_steps, model.settings.query_instruction
    taken = seconds(model, queries, choice.rule, instruction=instruction, steps=steps, repeats=repeats)
    return {"seconds_saved": 100 * taken.saving, "seconds_ceiling": 100 * taken.ceiling, "seconds_full": taken.full}


def paper(folder: Path) -> dict[str, Any]:
    """Read the paper's tables 1 and 2 and what it says of its premises."""
    tables = json.loads((folder / "tables.json").read_text(encoding="utf-8"))
    return {name: tables[f"convergestop_{name}"] for name in ("table1", "table2_patience", "premises")}


def main() -> None:
    """Measure the sets, and write one file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--repeats", type=int, default=3, help="turns in which seconds are measured")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--papers", type=Path, default=DATA.parent / "papers", help="folder with the paper's tables.json")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result file")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if (args.papers / "tables.json").is_file():
        replace_text(FOLDER / "paper.json", json.dumps(paper(args.papers), indent=1) + "\n")
    paths = {name: FOLDER / f"{Path(args.model).name}-{name}.json" for name in args.sets}
    missing = [name for name, path in paths.items() if not is_kept(path, again=args.again)]
    model = genembed.load(args.model)
    for name in missing:
        folder = args.data / "retrieval" / name
        found = analysed(model, read(folder, "qrels.tsv"), repeats=args.repeats)
        result = {"benchmark": "halting", "set": name, "machine": machine(), **found}
        if name == CERTIFIED:
            result["certified"] = certified(model, folder, repeats=args.repeats)
        replace_text(paths[name], json.dumps(result) + "\n")
        print(f"{paths[name].name}: written", flush=True)


if __name__ == "__main__":
    main()
