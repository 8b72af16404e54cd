"""Write docs/reproduction.md and its figures from the result files of benchmarks/reproduce.py, so that no number and no verdict is typed.

    python benchmarks/report.py [--check]

`--check` only compares, and fails where the document or a figure is not that of the result files. What was not run is said so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from figures import ENDINGS, FIGURES, HALTING_FIGURES, fingerprint, halting_fingerprint, mark_of, pairs_of, save
from halting_verdicts import Measured
from markdown import demoted, table
from matplotlib.figure import Figure
from report_halting import part_two
from results_file import RESULTS
from small_sets import DEVELOPMENT_SETS, TEST_SETS
from verdicts import (
    BASELINES,
    LEAST_SEEDS,
    MOST_STEPS,
    NO_GAIN,
    ROWS,
    SPIKE,
    TRAINED_STEPS,
    UNTRAINED,
    NotRunError,
    Results,
    Run,
    Verdict,
    interval,
    read_results,
    verdict,
)

FOLDER = RESULTS / "reproduction"
DOCUMENT = Path(__file__).parents[1] / "docs" / "reproduction.md"
PICTURES = DOCUMENT.with_suffix("")

BACKBONES = {
    "decoder": "a causal decoder of four layers, made from scratch and started from a bag of token embeddings (`recipes/decoder.py`)",
    "mini": "a LoRA adapter and a soft-token head over all-MiniLM-L6-v2, read as a prefix language model (`recipes/mini.py`, shortened). "
    "Where it generates, the prompt is read by the unchanged base model and pooled too; in one-pass models the adapter works on the prompt",
}
CLAIMS = {
    "G1": "generating without being trained to degrades embeddings",
    "G2": "GIRCSE beats one-pass models trained on the same data",
    "G3": "each part helps: none < Gen < Gen + SL < Gen + SL + IR",
    "G4": "quality rises with K, beyond the trained K too",
    "G5": "one-pass models do not gain from generating",
    "G7": "training is stable",
    "G10": "the lead over one-pass models is larger with less data",
}
GROUPS = {"Retr.": ("scifact", "fiqa_mini"), "Class.": ("banking77", "trec_qc"), "STS": ("stsb", "sick")}
"""Columns of the paper's table 3 that we have sets for."""
PAPER_COLUMNS = {"Retr.": 0, "Class.": 4, "STS": 5, "Avg.": 7}
PAPER_ROWS = {"gen": "gen", "gen-sl": "gen+sl", "gircse": "gen+sl+ir"}
LABELS = {"gen": "Gen", "gen-sl": "Gen + SL", "gircse": "Gen + SL + IR (GIRCSE)"}
VARIANTS = {
    "gircse-everywhere": "GIRCSE, adapter on the prompt too",
    "gircse-slow": "GIRCSE, a third of the learning rate",
    "gircse-flat": "GIRCSE, soft token of temperature 4",
    "gircse-on-average": "GIRCSE over the fine-tuned one-pass model",
}
SHOWN = (1, 3, 5, 10, 15, 20)
OPTIONS = {
    "gradcache": "GradCache, twice the pairs in a batch",
    "mask": "false-negative mask, all-MiniLM-L6-v2's eyes",
    "matryoshka": "Matryoshka, 64 and all dimensions",
    "distillation": "distillation of all-MiniLM-L6-v2's similarities",
    "steps-20": "K = 20 in training",
    "self-distillation": "K = 20, and z_5 towards z_20",
}
_LONG = ("steps-20", "self-distillation")


def spread(values: Sequence[float]) -> str:
    """Show mean and standard deviation over seeds; of one seed its value alone."""
    return f"{np.mean(values):.2f}" if len(values) < 2 else f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def mean_of(run: Run, steps: int, sets: Sequence[str] = tuple(TEST_SETS)) -> float:
    """Return a run's mean over sets at one K."""
    return float(np.mean([run["scores"][name][steps] for name in sets]))


def cell(results: Results, name: str, steps: int, sets: Sequence[str] = tuple(TEST_SETS)) -> str:
    """Show an experiment at one K, as far as it was run."""
    runs = results.by_name.get(name, ())
    return spread([mean_of(run, steps, sets) for run in runs]) if runs else "not run"


def verdicts(found: dict[str, Results]) -> str:
    """Return the table of claims."""
    rows, comparisons = [], []
    for claim, text in CLAIMS.items():
        judged = {backbone: verdict(claim, results) for backbone, results in found.items()}
        rows.append([claim, text, *(f"**{one.word}**" for one in judged.values())])
        comparisons += [line for backbone, one in judged.items() for line in _comparisons(backbone, one)]
    heads = ["backbone", "claim", "comparison", "difference and 95 % interval", "as claimed"]
    return f"{table(['', 'claim', *found], rows)}\n\n{table(heads, comparisons)}"


def _comparisons(backbone: str, one: Verdict) -> list[list[str]]:
    lines = [[backbone, one.claim, part.what, str(part.interval), part.state] for part in one.comparisons]
    if not lines:
        return [[backbone, one.claim, one.note, "", ""]]
    lines[-1][2] += f"; {one.note}" if one.note else ""
    return lines


def ablation(results: Results, paper: dict[str, Any]) -> str:
    """Return table 3, the paper's beside ours."""
    none = BASELINES[results.backbone][0]
    known = paper.get("table3", {})
    rows = []
    for name in (none, *ROWS):
        theirs = known.get(PAPER_ROWS.get(name, "none"))
        steps = MOST_STEPS if name in ROWS else 0
        own = [cell(results, name, steps, sets) for sets in (*GROUPS.values(), tuple(TEST_SETS))]
        beside = [f"{theirs[place]:.2f}" for place in PAPER_COLUMNS.values()] if theirs else [""] * len(PAPER_COLUMNS)
        rows.append([LABELS.get(name, f"none ({name})"), *own, cell(results, name, TRAINED_STEPS) if steps else "", *beside])
    for name, label in VARIANTS.items():
        if name in results.by_name:
            own = [cell(results, name, MOST_STEPS, sets) for sets in (*GROUPS.values(), tuple(TEST_SETS))]
            rows.append([label, *own, cell(results, name, TRAINED_STEPS), *[""] * len(PAPER_COLUMNS)])
    others = [name for name in ("bag", *UNTRAINED[results.backbone], *BASELINES[results.backbone][1:]) if name in results.by_name]
    for name in others:
        own = [cell(results, name, 0, sets) for sets in (*GROUPS.values(), tuple(TEST_SETS))]
        rows.append([name, *own, "", *[""] * len(PAPER_COLUMNS)])
    heads = ["", *GROUPS, "mean", f"mean, K = {TRAINED_STEPS}", *(f"paper {column}" for column in PAPER_COLUMNS)]
    return table(heads, rows)


def test_time(results: Results) -> str:
    """Return quality by K, of GIRCSE by set, and of the others in mean."""
    rows = []
    for label, sets in {**{name: (name,) for name in TEST_SETS}, "**mean**": tuple(TEST_SETS)}.items():
        rows.append([f"GIRCSE, {label}", "", *(cell(results, "gircse", k, sets) for k in SHOWN)])
    for name in ("gen", "gen-sl", "steps-20", *VARIANTS, *BASELINES[results.backbone], *UNTRAINED[results.backbone]):
        if name in results.by_name:
            start = "" if results.by_name[name][0]["scores"]["stsb"][0] is None else cell(results, name, 0)
            rows.append([f"{name}, mean", start, *(cell(results, name, k) for k in SHOWN)])
    return table(["", "K = 0", *(f"K = {k}" for k in SHOWN)], rows)


def data_sizes(results: Results, paper: dict[str, Any]) -> str:
    """Return quality by size of data."""
    shown = {f"GIRCSE, K = {MOST_STEPS}": ("gircse", MOST_STEPS), f"GIRCSE, K = {TRAINED_STEPS}": ("gircse", TRAINED_STEPS)}
    shown |= {name: (name, 0) for name in BASELINES[results.backbone]}
    rows = [[label, *(cell(results, f"{name}{ending}", k) for ending in ENDINGS)] for label, (name, k) in shown.items()]
    pairs = [f"{pairs_of(runs[0]):,} pairs" if (runs := results.by_name.get(f"gircse{ending}")) else "not run" for ending in ENDINGS]
    theirs = "; ".join(
        f"{model} {own['gircse']:.1f} to {own['causal-eos']:.1f}" for model, own in paper.get("section6_50k_average", {}).items()
    )
    return (
        f"{table(['mean of sets', *pairs], rows)}\n\nThe paper, 50,000 pairs, GIRCSE to Causal-EOS, MTEB average: {theirs or 'not read'}."
    )


def options(results: Results) -> str:
    """Return what each option of the training changes."""
    rows = [_option_row(results, "gircse-half", "reference: GIRCSE at half the data", "")]
    for name, what in OPTIONS.items():
        reference = "steps-20" if name == "self-distillation" else "gircse-half"
        rows.append(_option_row(results, name, what, reference))
    heads = ["", f"mean, K = {TRAINED_STEPS}", f"mean, K = {MOST_STEPS}", f"to its reference, K = {TRAINED_STEPS}"]
    heads += [f"to its reference, K = {MOST_STEPS}", f"64 dimensions, K = {TRAINED_STEPS}", "CPU s / update"]
    return f"{table(heads, rows)}\n\n{_gathering(results)}"


def _option_row(results: Results, name: str, what: str, reference: str) -> list[str]:
    runs = results.by_name.get(name, ())
    if not runs:
        return [what, "not run", *[""] * 5]
    narrow = spread([float(np.mean([own[str(TRAINED_STEPS)] for own in run["narrow"].values()])) for run in runs])
    seconds = spread([run["cpu_seconds"]["training"] / run["training"]["updates"] for run in runs])
    gains = [_gain(results, name, reference, k) if reference else "" for k in (TRAINED_STEPS, MOST_STEPS)]
    return [what, cell(results, name, TRAINED_STEPS), cell(results, name, MOST_STEPS), *gains, narrow, seconds]


def _gain(results: Results, name: str, reference: str, steps: int) -> str:
    try:
        return str(interval(results.quality(name, steps) - results.quality(reference, steps)))
    except NotRunError as missing:
        return f"not run ({missing})"


def _gathering(results: Results) -> str:
    """Compare two processes with one that has the same pairs in a batch."""
    divided, whole = (next((run for run in results.by_name.get(name, ()) if run["seed"] == 0), None) for name in ("gather", "gircse-half"))
    if divided is None or whole is None:
        return "Candidates gathered across two processes: not run."
    losses = [np.asarray(run["curves"]["loss"]) for run in (divided, whole)]
    quality = [mean_of(run, TRAINED_STEPS) for run in (divided, whole)]
    return (
        f"Candidates gathered across two processes of {divided['training']['queries']} pairs each, beside one of "
        f"{whole['training']['queries']}, same pairs: mean at K = {TRAINED_STEPS} {quality[0]:.2f} beside {quality[1]:.2f}; the logged "
        f"losses differ by at most {np.abs(losses[0] - losses[1]).max():.2g} (the first by {abs(losses[0][0] - losses[1][0]):.2g})."
    )


def temperatures(results: Results) -> str:
    """Return the choice of the soft token's temperature."""
    names = sorted((name for name in results.by_name if name.startswith("temperature-")), key=lambda name: float(name.split("-")[1]))
    if not names:
        return "Not run."
    development = tuple(DEVELOPMENT_SETS)
    rows = [[name.split("-")[1], *(cell(results, name, k, development) for k in (1, TRAINED_STEPS, MOST_STEPS))] for name in names]
    return (
        f"{table(['T', 'K = 1', f'K = {TRAINED_STEPS}', f'K = {MOST_STEPS}'], rows)}\n\n"
        f"Chosen: T = {best_temperature(results):g}, the best mean of K = {TRAINED_STEPS} and K = {MOST_STEPS}."
    )


def best_temperature(results: Results) -> float:
    """Return the temperature with the best mean of the trained and the largest K on the development sets."""
    development = tuple(DEVELOPMENT_SETS)
    quality = {
        float(name.split("-")[1]): np.mean([mean_of(runs[0], k, development) for k in (TRAINED_STEPS, MOST_STEPS)])
        for name, runs in results.by_name.items()
        if name.startswith("temperature-")
    }
    return max(quality, key=lambda temperature: quality[temperature])


def setting(results: Results) -> str:
    """Say how the main experiment was trained, from its result file."""
    runs = results.by_name.get("gircse", ())
    if not runs:
        return "GIRCSE itself was not run yet."
    own, read = runs[0]["training"], runs[0]["read"]
    minutes = (
        sum(run["cpu_seconds"][part] for named in results.by_name.values() for run in named for part in ("training", "measuring")) / 60
    )
    return (
        f"{own['updates']} updates of {own['queries']} pairs ({pairs_of(runs[0]):,} pairs out of {len(own['sources'])} files, none "
        f"twice), queries of at most {own['query_tokens']} and passages of {own['passage_tokens']} tokens, K = {own['max_steps']}, loss "
        f"temperature {own['objective']['temperature']:g}, soft-token temperature {read['temperature']:g}, highest learning rate "
        f"{own['learning_rate']:g} for every model; measured texts are cut at {read['max_length']} tokens. All experiments took "
        f"{minutes:.0f} minutes of CPU time."
    )


def section(results: Results, paper: dict[str, Any]) -> str:
    """Return the part of the document about one backbone."""
    name = results.backbone
    parts = [
        f"## {name}\n\n{BACKBONES[name][0].upper()}{BACKBONES[name][1:]}. {setting(results)}",
        f"### Ablation (table 3)\n\nOurs at K = {MOST_STEPS}, one-pass models at K = 0, with the deviation over seeds; the paper's "
        f"columns are MTEB's tasks, not our sets.\n\n{ablation(results, paper)}",
        f"### Test-time scaling (figure 2)\n\n{_picture(results, 'steps')}\n\n{test_time(results)}",
        f"### Data (figure 3)\n\n{_picture(results, 'data')}\n\n{data_sizes(results, paper)}",
        f"### Training curves (figures 4 and 5)\n\n{_picture(results, 'curves')}",
    ]
    if name == "decoder":
        parts.append(f"### Options of the training\n\n{options(results)}")
        parts.append(f"### Soft-token temperature\n\n{temperatures(results)}")
    return "\n\n".join(parts)


def _picture(results: Results, figure: str) -> str:
    if not results.by_name.get("gircse"):
        return "Not run."
    return f"![{figure}, {results.backbone}]({PICTURES.name}/{results.backbone}-{figure}.png)"


def document(runs: Sequence[Run], paper: dict[str, Any], measured: Measured) -> str:
    """Return the whole document."""
    parts = [part_one(runs, paper), part_two(measured, PICTURES.name)]
    return "\n\n".join([_TITLE.strip(), *(demoted(part).strip() for part in parts)]) + "\n"


def part_one(runs: Sequence[Run], paper: dict[str, Any]) -> str:
    """Return what the experiments with training say."""
    found = {backbone: Results.of(backbone, runs) for backbone in BACKBONES}
    text = _OPENING.format(
        seeds=LEAST_SEEDS,
        sets="\n".join(f"- {name}: {what}" for name, what in {**TEST_SETS, **DEVELOPMENT_SETS}.items()),
        verdicts=verdicts(found),
        lead=_paper_leads(paper),
        gain=NO_GAIN,
        spike=SPIKE,
    )
    return "\n\n".join([text.strip(), *(section(results, paper) for results in found.values())])


def _paper_leads(paper: dict[str, Any]) -> str:
    leads = [
        f"{model} {own['gircse']:.2f} beside Causal-EOS {own['causal-eos']:.2f} and Bidirectional-Avg {own['bidirectional-avg']:.2f}"
        for model, own in paper.get("table2_average", {}).items()
    ]
    return "; ".join(leads) or "not read"


_TITLE = """
# Reproduction

What the two papers claim, at the scale of two CPU cores: [GIRCSE](#part-1-training-on-two-small-backbones) (generative embeddings, trained
step by step) and [ConvergeStop](#part-2-convergestop-instructions-and-what-generation-costs) (halting them when they stand still).
`make reproduce` runs what has no result file yet, and writes this page from the files; no number and no verdict is typed.
"""

_OPENING = """
# Part 1: training, on two small backbones

From [result files](../benchmarks/results/reproduction) of `benchmarks/reproduce.py`. The paper trains models of 0.5 to 7 billion
weights on 50,000 to 200,000 pairs; here a few thousand pairs and a CPU have to do, so a verdict says what holds at this scale, and
none says what holds at the paper's. What was not run is called so.

## Verdicts

{verdicts}

Rules (`benchmarks/verdicts.py`): a comparison is the mean over sets of paired differences, same texts and same seed; its interval
is the 95 % percentile interval of a bootstrap that draws seeds and sets anew. A claim holds if every comparison has its interval on
the claimed side (yes), in part if some have; if none has, it does not hold where one lies on the other side (no), and is not decided
where all lie across zero (open). GIRCSE is taken at K = 20, as in the paper, and at the K of its training; one-pass models at K = 0. G5:
the interval ends below +{gain:g}. G7: the loss is lower in the last fifth than in the first, and after the warm-up no gradient norm
is above {spike:g} times the run's median, in every seed. Trained models have at least {seeds} seeds; a seed decides the order of the
pairs and the start of an adapter, not the weights that training starts from.

The paper's averages (table 2, MTEB): {lead}.

Sets, each a fixed random part, read without instructions; the last three are for choices:

{sets}
"""


def pictures(runs: Sequence[Run], measured: Measured) -> Mapping[Path, tuple[Callable[[], Figure], str]]:
    """Return how each picture is drawn, and the mark of what it shows."""
    found = [results for backbone in BACKBONES if (results := Results.of(backbone, runs)).by_name.get("gircse")]
    made = {
        PICTURES / f"{one.backbone}-{name}.png": (partial(draw, one), fingerprint(one)) for one in found for name, draw in FIGURES.items()
    }
    mark = halting_fingerprint(measured)
    halting = {PICTURES / f"halting-{name}.png": (partial(draw, measured), mark) for name, draw in HALTING_FIGURES.items()}
    return made | halting if measured.sets else made


def main() -> None:
    """Write the document and its figures, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    runs, known, measured = read_results(FOLDER), FOLDER / "paper.json", Measured.read(RESULTS, "mini")
    paper = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    made, drawn = document(runs, paper, measured), pictures(runs, measured)
    stale = [path for path, (_, mark) in drawn.items() if mark_of(path) != mark]
    if arguments.check:
        if not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != made or stale:
            sys.exit(f"{DOCUMENT}, {[path.name for path in stale]}: not those of the result files; run benchmarks/report.py")
        return
    DOCUMENT.write_text(made, encoding="utf-8")
    for path in stale:
        draw, mark = drawn[path]
        save(draw(), path, mark)
    print(f"{DOCUMENT}: {len(runs)} results of training, {len(measured.sets)} sets halted")


if __name__ == "__main__":
    main()
