"""Write the tables of README, mini's card and pages of docs from the result files, so that no number is typed.

    python benchmarks/tables.py [--check]

Each block of README between `<!-- table: NAME -->` and `<!-- end -->` is made by the function of that name from the newest result
file of its benchmark. `--check` only compares, and fails where they differ.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halting_verdicts import Measured
from markdown import table
from reliability_table import reliability
from report_halting import certified as certified_section
from results_file import RESULTS, source, stored
from speed_tables import TABLES as SPEED

README = Path(__file__).parents[1] / "README.md"
CALIBRATION = README.parent / "docs" / "calibration.md"
PERFORMANCE = CALIBRATION.parent / "performance.md"
SERVING, INDEX, EXPORT, JOBS, RELIABILITY = (
    CALIBRATION.parent / f"{name}.md" for name in ("serving", "indexing", "export", "jobs", "reliability")
)
CARD = README.parent / "genembed" / "builtin" / "mini" / "README.md"

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def scifact() -> str:
    """Quality on SciFact."""
    path, result = stored("scifact")
    rows = []
    for one in result["runs"]:
        low, high = one["difference_to_k0_95"]
        steps = "" if one["query_steps"] is None else f"{one['query_steps']:.1f} / {one['document_steps']:.1f}"
        rows.append([one["label"], f"{one['ndcg@10']:.2f}", f"{low:+.2f} to {high:+.2f}", steps])
    return f"{source(path)}\n\n{table(['', 'nDCG@10', 'to K = 0', 'mean steps, queries / documents'], rows)}"


def gates() -> str:
    """Quality of `mini` on the development sets, for every K."""
    path, result = stored("gates")
    shown = (0, 1, 3, 5, 10, 20)
    rows = [
        [name, *(f"{one['curve'][k]:.2f}" for k in shown), f"{one['halted']:.2f} at {one['mean_steps']:.1f}"]
        for name, one in result["sets"].items()
    ]
    distinct = ", ".join(f"{result['distinct_tokens'][k - 1]:.0%} at step {k}" for k in (1, 2, 5, 20))
    gates = "\n".join(f"- {name}: {'passed' if passed else '**missed**'}" for name, passed in result["gates"].items())
    heads = ["development set", *(f"K = {k}" for k in shown), "halted, at mean k*"]
    return f"{source(path)}\n\n{table(heads, rows)}\n\nDistinct likeliest tokens over texts: {distinct}.\n\n{gates}"


def quality() -> str:
    """Quality on test sets, for every K."""
    path, result = stored("quality")
    shown = (0, 1, 3, 5, 10, 20)
    rows = [
        [name, *(f"{one['curve'][k]:.2f}" for k in shown), f"{one['halted']:.2f} at {one['mean_steps']:.1f}", _or_none(one["bm25"])]
        for name, one in result["sets"].items()
    ]
    halted = sum(one["halted"] for one in result["sets"].values()) / len(result["sets"])
    rows.append(["mean", *(f"{result['mean'][k]:.2f}" for k in shown), f"{halted:.2f}", ""])
    heads = ["test set", *(f"K = {k}" for k in shown), "halted, at mean k*", "BM25"]
    return f"{source(path)}\n\n{table(heads, rows)}"


def certified() -> str:
    """Halting rules chosen on other queries than they are measured on."""
    results = Measured.read(RESULTS, "mini")
    path = RESULTS / "halting" / "mini-scifact.json"
    return f"[result file](benchmarks/results/halting/{path.name}): {certified_section(results)}"


MODELS = {
    "mini": ("", "mini-seed-*"),
    "fine-tuned, mean of the prompt (Bidirectional-Avg)": ("bidirectional_avg-*",),
    "fine-tuned, last state (EOS)": ("eos-*",),
}
"""Models trained on the same pairs for as many updates, by the names of their result files: one for each seed."""


def trained() -> str:
    """Quality of mini and of models trained on the same data without generation, mean over seeds."""
    seeds = {name: [result for own in patterns for result in _results(own)] for name, patterns in MODELS.items()}
    first = seeds["mini"][0]
    sets = list(first["sets"])
    rows = [["all-MiniLM-L6-v2", "", *(f"{first['sets'][name]['curve'][0]:.2f}" for name in sets), f"{first['mean'][0]:.2f}"]]
    for name, runs in seeds.items():
        last = [[run["sets"][one]["curve"][-1] for run in runs] for one in sets]
        if runs:
            label = f"{name}, K = 20" if name == "mini" else name
            rows.append([label, str(len(runs)), *(_spread(own) for own in last), _spread([run["mean"][-1] for run in runs])])
    return table(["", "seeds", *sets, "mean"], rows)


def _results(pattern: str) -> list[dict[str, Any]]:
    """Return the newest result of every model that a pattern names; an empty one is the shipped model."""
    names = {path.stem.rsplit("_", 2)[0] for path in RESULTS.glob(f"quality{'-' if pattern else ''}{pattern}_*.json")}
    return [stored(name)[1] for name in sorted(names)]


def _spread(values: list[float]) -> str:
    """Show the mean, and the standard deviation of several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def _or_none(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def calibration() -> str:
    """How often a rule is certified falsely, in synthetic worlds."""
    path, result = stored("calibration")
    rows = [
        [
            f"{one['loss']}, {one['epsilon']:g}",
            f"{one['queries']:,}",
            f"{one['false_certified']:.1%} ({one['false_certified_upper95']:.1%})",
            f"{one['false_naive']:.1%}",
            f"{one['something_certified']:.0%}",
            f"{one['share_of_sound_candidates']:.0%}",
        ]
        for one in result["rows"]
    ]
    heads = ["loss, bound", "queries", "false, certified (at most, 95 %)", "false, naive", "certified anything", "of the sound candidates"]
    return f"{source(path)}, {result['rows'][0]['worlds']:,} worlds a row, delta = {result['delta']:g}.\n\n{table(heads, rows)}"


def output_forms() -> str:
    """What a smaller form of the vectors costs in retrieval."""
    path, result = stored("output-forms")
    rows = []
    for row in result["rows"]:
        low, high = row["difference_95"]
        rows.append([row["form"], str(row["bytes"]), f"{row['ndcg@10']:.2f}", f"{low:+.2f} to {high:+.2f}"])
    return f"{source(path)}\n\n{table(['form', 'bytes a document', 'nDCG@10', 'to float32'], rows)}"


def index_forms() -> str:
    """What an index saves by a smaller form of its vectors, and what it finds then."""
    path, result = stored("index-forms")
    rows = []
    for row in result["rows"]:
        low, high = row["difference_95"]
        found = [f"{row['ndcg@10']:.2f}", f"{low:+.2f} to {high:+.2f}", f"{100 * row['recall@10']:.1f} %"]
        sizes = [str(row["bytes_vector"]), f"{row['bytes_folder'] / 1e6:.1f} MB"]
        rows.append([f"`{row['form']}`", *sizes, *found, f"{row['milliseconds']:.0f} ms"])
    heads = ["kept in", "bytes a vector", "whole folder", "nDCG@10", "to float32", "recall@10", "a search"]
    return f"{source(path)}, {result['documents']:,} documents, {result['queries']} queries.\n\n{table(heads, rows)}"


def jobs() -> str:
    """What corpus jobs lose, and what they take."""
    (kills_path, kills), (faults_path, faults) = stored("jobs-kills"), stored("jobs-faults")
    (scheduler_path, scheduler), (corpus_path, corpus) = stored("jobs-scheduler"), stored("jobs-corpus")
    disks = {name: one for name, one in faults.items() if isinstance(one, dict) and "not_named" in one}
    flips = faults["flipped in a finished job"]
    peaks = corpus["peak_memory_mib_by_shard"]
    rows = [
        [
            f"killed at random instants, {kills['rows']:,} rows, {kills['workers']} workers ({source(kills_path)})",
            f"{kills['kills']:,} kills, {kills['jobs_finished']} jobs",
            f"{kills['not_identical']} other bytes, {kills['lost']} rows lost, {kills['twice']} twice",
        ],
        [
            f"{', '.join(disks)}, at every write ({source(faults_path)})",
            f"{sum(one['tried'] for one in disks.values())}",
            f"{sum(one['not_named'] for one in disks.values())} not named, "
            f"{sum(one['not_identical'] for one in disks.values())} jobs with other bytes",
        ],
        ["a bit flipped in a finished job, `genembed job verify`", f"{flips['tried']}", f"{flips['missed']} missed"],
        [
            f"{scheduler['workers']} simulated workers, shards of {scheduler['mean_seconds_of_a_shard']} s, the longest "
            f"{scheduler['longest_to_mean']} times that ({source(scheduler_path)})",
            f"{scheduler['shards']} shards",
            f"{scheduler['overhead']:.2%} of the workers' time lost; {scheduler['makespan_seconds']} s, list scheduling "
            f"{scheduler['list_scheduling_seconds']} s",
        ],
        [
            f"`{corpus['model']}` over {corpus['rows']:,} texts, {corpus['tokens'] / corpus['rows']:.0f} tokens each, one process "
            f"({source(corpus_path)})",
            f"{corpus['shards']} shards",
            f"{corpus['rows_per_second']:.0f} rows/s, {corpus['mean_steps']:.2f} steps, at a mean load of {corpus['mean_load']}; "
            f"peak memory {peaks[1]:,} MiB in the second shard, "
            f"{peaks[-1]:,} in the last",
        ],
    ]
    return table(["", "tried", "found"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "scifact": scifact,
    "gates": gates,
    "quality": quality,
    "certified": certified,
    "trained": trained,
    "calibration": calibration,
    "output_forms": output_forms,
    "index_forms": index_forms,
    "jobs": jobs,
    "reliability": reliability,
    **SPEED,
}


def filled(text: str, folder: Path) -> str:
    """Return a document of a folder with every table made anew."""
    to_root = "../" * len(folder.relative_to(README.parent).parts)

    def table(block: re.Match[str]) -> str:
        return f"{block[1]}{TABLES[block[2]]().replace('](benchmarks/', f']({to_root}benchmarks/')}\n{block[3]}"

    return _BLOCK.sub(table, text)


def main() -> None:
    """Rewrite the documents, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    for path in (README, CARD, CALIBRATION, PERFORMANCE, SERVING, INDEX, EXPORT, JOBS, RELIABILITY):
        text = path.read_text(encoding="utf-8")
        made = filled(text, path.parent)
        if arguments.check and made != text:
            sys.exit(f"{path}: its tables are not those of the result files; run benchmarks/tables.py")
        path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
