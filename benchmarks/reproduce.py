"""Run the experiments of docs/reproduction.md: train, measure every K, write one result file for each.

    python benchmarks/reproduce.py [--backbone decoder mini] [--part temperature ablation scaling options] [--workers N] [--dry-run]
    python benchmarks/report.py

An experiment whose result file is there is left out, and one that was killed goes on from its last checkpoint, so the command can be
given again at any time. Every experiment is a process of its own with one thread; one that fails does not stop the others. What
the decoder starts from is made first (recipes/decoder_data.py, recipes/decoder.py:eos), and the texts to keep out of training
(recipes/mini_data.py).
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from curves import STEPS, Curves
from evaluation_data import DATA
from experiments import MERGED, NARROW, PARTS, ROOT, RUNS, Experiment, matrix
from results_file import RESULTS, machine
from small_sets import development_sets, test_sets

import genembed
from genembed.files import read_texts, replacing_folder
from genembed.train.durable import replace_text
from genembed.train.model import build
from genembed.train.overlap import TextFilter
from genembed.train.pairs import DataFile
from genembed.train.recipe import Recipe
from genembed.train.run import train

FOLDER = RESULTS / "reproduction"
EXCLUDE = Path("runs/mini-data/exclude.txt")
POINTS = 100
"""Most points of a curve that are kept."""
NARROW_STEPS = (5, 20)
"""K at which the leading dimensions are measured too."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def run(experiment: Experiment, data: Path) -> dict[str, Any] | None:
    """Train and measure; of several processes the first one returns what the result file says."""
    output, first = RUNS / experiment.key, os.environ.get("RANK", "0") == "0"
    begin, begin_cpu = time.perf_counter(), time.process_time()
    trained: dict[str, Any] = {"training": None, "curves": None}
    if experiment.recipe is not None:
        make_base(Path(experiment.recipe.model))
        train(experiment.recipe, output, resume=any(output.glob("checkpoint-*")), exclude=excluded())
        if not first:
            return None
        trained = {"training": described(experiment.recipe), "curves": history(output)}
    done, done_cpu = time.perf_counter(), time.process_time()
    measured = bag_scores(experiment, data) if experiment.read is None else scores(experiment, data, output)
    return {
        "experiment": experiment.key,
        "name": experiment.name,
        "backbone": experiment.backbone,
        "seed": experiment.seed,
        "machine": machine(),
        "processes": experiment.processes,
        **trained,
        "read": None if experiment.read is None else experiment.read.to_json(),
        "seconds": {"training": done - begin, "measuring": time.perf_counter() - done},
        "cpu_seconds": {"training": done_cpu - begin_cpu, "measuring": time.process_time() - done_cpu},
        **measured,
    }


def make_base(folder: Path) -> None:
    """Merge the adapter of an experiment that was run before, if that is what a folder is to hold."""
    if folder.name != MERGED or folder.is_dir():
        return
    if not folder.parent.is_dir():
        raise SystemExit(f"{folder.parent} is not there to start from: run --experiment {folder.parent.name} first")
    recipe = next(one.recipe for one in matrix() if one.key == folder.parent.name)
    assert recipe is not None
    model = build(replace(recipe, fit_head=0, head_tokens=0), lambda _tokenizer: [])
    model.restore(folder.parent)
    assert model.adapter is not None
    merged: Any = model.adapter.merge_and_unload()
    with replacing_folder(folder) as made:
        merged.bert.save_pretrained(made)  # the encoder alone: GIRCSE fits a head of its own to it
        model.tokenizer.tokenizer.save_pretrained(made)


def excluded() -> TextFilter:
    """Read the texts that must not be trained on."""
    return TextFilter.from_texts(record.text for record in read_texts(EXCLUDE) if record.text.strip())


def described(recipe: Recipe) -> dict[str, Any]:
    """Return what was trained, without the paths of a machine."""
    names = ("queries", "chunk", "updates", "min_steps", "max_steps", "query_tokens", "passage_tokens", "learning_rate", "weight_decay")
    return {
        **{name: getattr(recipe, name) for name in names},
        "model": Path(recipe.model).name,
        "teacher": None if recipe.teacher is None else Path(recipe.teacher).name,
        "objective": asdict(recipe.objective),
        "sources": [_source(file) for file in recipe.files],
    }


def _source(file: DataFile) -> str:
    return file.source


def history(output: Path) -> dict[str, list[float]]:
    """Read loss and gradient norm over the updates, thinned."""
    with (output / "history.csv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("loss")]
    kept = rows[:: max(1, -(-len(rows) // POINTS))]
    return {name: [float(row[name]) for row in kept] for name in ("step", "loss", "grad_norm", "step_losses_first", "step_losses_last")}


def scores(experiment: Experiment, data: Path, output: Path) -> dict[str, Any]:
    """Measure a model on every set at every K."""
    assert experiment.read is not None
    model = genembed.load(experiment.model or output, preset=experiment.read)
    found: dict[str, Any] = {"scores": {}, "narrow": {}}
    for one in development_sets(data) if experiment.development else test_sets(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # abstracts are longer than what is read
            curves = one.embed(model)
        last = STEPS if experiment.read.halt.max_steps else 0
        first = 1 if experiment.read.pooling.needs_steps else 0
        found["scores"][one.name] = [None] * first + [round(curves.at(k), 3) for k in range(first, last + 1)]
        found["narrow"][one.name] = {str(k): round(narrowed(curves, k), 3) for k in NARROW_STEPS if k <= last}
    return found


def narrowed(curves: Curves, steps: int) -> float:
    """Score the leading dimensions alone."""
    cut = {role: curve[:, steps, :NARROW] for role, curve in curves.vectors.items()}
    return curves.of.score({role: vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) for role, vectors in cut.items()})


def bag_scores(experiment: Experiment, data: Path) -> dict[str, Any]:
    """Measure the bag of token embeddings, which has K = 0 alone."""
    sys.path.append(str(ROOT / "recipes"))
    embed = import_module("decoder_data").bag_vectors
    folder = Path(experiment.model or "")
    measured = {one.name: one.score({role: embed(folder, texts) for role, texts in one.texts.items()}) for one in test_sets(data)}
    return {"scores": {name: [round(score, 3)] for name, score in measured.items()}, "narrow": {}}


def paper(folder: Path) -> dict[str, Any]:
    """Read the paper's numbers: its table 3 as given, and those of table 2 and section 6 out of its text."""
    text = (folder / "gircse.txt").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if line.startswith(("Fair Baseline\t", "GIRCSE\t7B"))]
    names = ("causal-eos", "causal-eos", "bidirectional-avg", "bidirectional-avg", "gircse", "gircse")
    table2: dict[str, dict[str, float]] = {}
    for name, row in zip(names, rows, strict=True):
        table2.setdefault(row[3], {})[name] = float(re.match(r"[\d.]+", row[11])[0])  # type: ignore[index]
    found = re.findall(r"(Qwen-0\.5B|Llama-3B|Mistral-7B)[^%]{0,60}?\(([\d.]+)% vs\. ([\d.]+)%\)", text)
    return {
        "table2_average": table2,
        "table3": json.loads((folder / "tables.json").read_text(encoding="utf-8"))["gircse_table3_ablation"],
        "section6_50k_average": {model: {"gircse": float(ours), "causal-eos": float(theirs)} for model, ours, theirs in found},
    }


def run_one(key: str, data: Path) -> None:
    """Run one experiment in this process, and write its result."""
    experiment = next(one for one in matrix() if one.key == key)
    FOLDER.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{key}.lock").open("w") as lock:
        if experiment.processes == 1:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another queue may run it already
        result = run(experiment, data)
    if result is not None:
        replace_text(FOLDER / f"{key}.json", json.dumps(result) + "\n")
        for checkpoint in (RUNS / key).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def start(experiment: Experiment, data: Path) -> str | None:
    """Run one experiment in a process of its own; return why it failed, if it did."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(experiment.processes)]
    command = [
        sys.executable,
        *(several if experiment.processes > 1 else []),
        __file__,
        "--experiment",
        experiment.key,
        "--data",
        str(data),
    ]
    path = ROOT / RUNS / f"{experiment.key}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with path.open("w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **_ONE_THREAD}, stdout=log, stderr=log, check=False)
    took = f"{(time.perf_counter() - begin) / 60:.1f} min"
    if done.returncode == 0:
        print(f"{experiment.key}: done, {took}", flush=True)
        return None
    last = path.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no output"]
    print(f"{experiment.key}: FAILED after {took}, {path}: {last[0]}", flush=True)
    return last[0]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["decoder", "mini"], choices=["decoder", "mini"])
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--workers", type=int, default=1, help="experiments at a time, each with one thread")
    parser.add_argument("--dry-run", action="store_true", help="only print what is missing, with estimated minutes")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--papers", type=Path, default=DATA.parent / "papers")
    parser.add_argument("--experiment", metavar="KEY", help="run this experiment here, whether or not its result is there")
    arguments = parser.parse_args()
    os.environ.setdefault("GENEMBED_DATA", str(arguments.data))
    if arguments.experiment:
        run_one(arguments.experiment, arguments.data)
        return
    chosen = [one for one in matrix() if one.backbone in arguments.backbone and not set(arguments.part).isdisjoint(one.parts)]
    missing = [one for one in chosen if not (FOLDER / f"{one.key}.json").is_file()]
    for one in missing if arguments.dry_run else []:
        print(f"{one.seconds / 60:6.1f}  {one.key}  ({', '.join(one.parts)})")
    print(f"{len(chosen)} experiments, {len(missing)} to run, about {sum(one.seconds for one in missing) / 60:.0f} minutes of one thread")
    if arguments.dry_run:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.papers.is_dir():
        replace_text(FOLDER / "paper.json", json.dumps(paper(arguments.papers), indent=1) + "\n")
    with ThreadPoolExecutor(arguments.workers) as workers:
        failed = [error for error in workers.map(lambda one: start(one, arguments.data), missing) if error is not None]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
