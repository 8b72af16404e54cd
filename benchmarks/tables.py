"""Write the tables of README, mini's card and two pages of docs from the result files, so that no number is typed.

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
from report_halting import certified as certified_section
from results_file import RESULTS, newest

README = Path(__file__).parents[1] / "README.md"
CALIBRATION = README.parent / "docs" / "calibration.md"
PERFORMANCE = CALIBRATION.parent / "performance.md"
CARD = README.parent / "genembed" / "builtin" / "mini" / "README.md"

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def stored(theme: str) -> tuple[Path, dict[str, Any]]:
    """Return the newest result file of a benchmark, which must be there."""
    found = newest(theme)
    if found is None:
        raise SystemExit(f"no result file {theme}_*.json in {RESULTS}: run benchmarks/{theme.split('-')[0]}.py first")
    return found


def _source(path: Path) -> str:
    return f"[result file](benchmarks/results/{path.name})"


def throughput() -> str:
    """Time for each text of every variant, and what halting saves."""
    heads = [
        "",
        "one pass",
        "plain",
        "sorted",
        "engine",
        "plain / engine",
        "engine / one pass (bound)",
        "halting near 9",
        "spread over 4-20",
    ]
    rows, sources = [], []
    for model in ("mini", "mini-full", "qwen"):
        path, result = stored(f"throughput-{model}")
        sources.append(_source(path))
        rows += [_throughput_row(model, one) for one in result["comparisons"]]
    note = "Milliseconds a text; *halting*: share of the iteration saving saved in decoding; then of the whole time, with its ceiling."
    return f"{note} {', '.join(sources)}.\n\n{table(heads, rows)}"


def _throughput_row(model: str, one: Mapping[str, Any]) -> list[str]:
    variants = one["variants"]
    saved = [variants[f"engine {trace}"]["saving"] for trace in ("near 9", "4-20")]
    return [
        f"{model}, {one['texts']} {one['kind']}, mean {one['mean_tokens']:.0f} tokens",
        *(f"{variants[name]['ms_per_text']:.1f}" for name in ("causal-eos", "plain", "sorted", "engine")),
        f"{variants['engine']['plain_over_this']:.2f}x",
        f"{variants['engine']['to_causal_eos']:.2f} ({one['flop_bound']:.2f})",
        *(f"{saving['share']:.2f}; {saving['wall_clock']:.0%} of at most {saving['ceiling']:.0%}" for saving in saved),
    ]


def scifact() -> str:
    """Quality on SciFact."""
    path, result = stored("scifact")
    rows = []
    for one in result["runs"]:
        low, high = one["difference_to_k0_95"]
        steps = "" if one["query_steps"] is None else f"{one['query_steps']:.1f} / {one['document_steps']:.1f}"
        rows.append([one["label"], f"{one['ndcg@10']:.2f}", f"{low:+.2f} to {high:+.2f}", steps])
    return f"{_source(path)}\n\n{table(['', 'nDCG@10', 'to K = 0', 'mean steps, queries / documents'], rows)}"


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
    return f"{_source(path)}\n\n{table(heads, rows)}\n\nDistinct likeliest tokens over texts: {distinct}.\n\n{gates}"


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
    return f"{_source(path)}\n\n{table(heads, rows)}"


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


def training() -> str:
    """Time and memory of a training update."""
    path, result = stored("training")
    rows = []
    for one in result["comparisons"]:
        for name, row in one["variants"].items():
            label = f"{one['shape']}, {name}"
            rows.append(
                [
                    label,
                    f"{row['median']:.2f}",
                    f"{row['faster']:.2f}x ({row['ceiling']:.1f})",
                    f"{row['peak_mib']:.0f}",
                    f"{row['memory']:.2f}",
                ]
            )
    return f"{_source(path)}\n\n{table(['', 's / update', 'faster (ceiling)', 'peak MiB', 'of released'], rows)}"


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
    return f"{_source(path)}, {result['rows'][0]['worlds']:,} worlds a row, delta = {result['delta']:g}.\n\n{table(heads, rows)}"


def approximations() -> str:
    """What each approximation costs and gains."""
    path, result = stored("approximations-mini")
    named = {row["name"]: row for row in result["rows"]}
    sizes = [int(key.rsplit("_", 1)[1]) for key in result["rows"][0] if key.startswith("seconds_")]
    heads = [
        "",
        "cosine",
        "worst",
        *result["rows"][0]["quality"],
        *(f"ms, {size} quer{'y' if size == 1 else 'ies'}" for size in sizes),
        "faster",
    ]
    rows = []
    for row in result["rows"]:
        reference, dropped = named[row["reference"]], row["dropped"]
        rows.append(
            [
                row["name"] + (f" ({dropped:.0%} of the mass dropped)" if dropped is not None else ""),
                f"{row['cosine']:.5f}",
                f"{row['worst']:.3f}",
                *(f"{value:.2f}" for value in row["quality"].values()),
                *(f"{1e3 * row[f'seconds_{size}']:.0f}" for size in sizes),
                " / ".join(f"{reference[f'seconds_{size}'] / row[f'seconds_{size}']:.2f}x" for size in sizes),
            ]
        )
    return f"{_source(path)}\n\n{table(heads, rows)}"


def latency() -> str:
    """One query at a time."""
    path, result = stored("latency")
    rows = [
        [one["model"], way, f"{own['p50']:.0f}", f"{own['p95']:.0f}", f"{own['least']:.0f}", f"{own['p50'] / own['least']:.1f}x"]
        for one in result["models"]
        for way, own in one["ways"].items()
    ]
    return f"{_source(path)}\n\n{table(['', '', 'median, ms', '95 %, ms', 'ceiling, ms', 'of the ceiling'], rows)}"


def soft_token() -> str:
    """The soft token alone."""
    path, result = stored("soft_token")
    ways = list(result["comparisons"][0]["ways"])
    rows = [
        [
            f"{one['shape']}, {'tied' if one['tied'] else 'untied'}",
            str(one["rows"]),
            *(f"{1e3 * one['ways'][way]['median']:.2f}" for way in ways),
            f"{one['ways'][ways[-1]]['faster']:.2f}x",
            f"{one['ways'][ways[-1]]['share']:.0%}",
        ]
        for one in result["comparisons"]
    ]
    heads = ["", "rows", *(f"{way}, ms" for way in ways), f"{ways[-1]} / {ways[0]}", "of the ceiling"]
    return f"{_source(path)}\n\n{table(heads, rows)}"


def int8() -> str:
    """Products with 8-bit weights."""
    path, result = stored("int8")
    ways = list(result["rows"][0]["us"])
    rows = [[row["layer"], str(row["rows"]), *(f"{row['us'][way]:.0f}" for way in ways)] for row in result["rows"]]
    return f"{_source(path)}, torchao {result['torchao']}; microseconds.\n\n{table(['', 'rows', *ways], rows)}"


TABLES: Mapping[str, Callable[[], str]] = {
    "throughput": throughput,
    "scifact": scifact,
    "gates": gates,
    "quality": quality,
    "certified": certified,
    "trained": trained,
    "training": training,
    "calibration": calibration,
    "approximations": approximations,
    "latency": latency,
    "soft_token": soft_token,
    "int8": int8,
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
    for path in (README, CARD, CALIBRATION, PERFORMANCE):
        text = path.read_text(encoding="utf-8")
        made = filled(text, path.parent)
        if arguments.check and made != text:
            sys.exit(f"{path}: its tables are not those of the result files; run benchmarks/tables.py")
        path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
