"""Part 2 of docs/reproduction.md: ConvergeStop and what generation costs, from the result files; report.py writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halting_verdicts import BEYOND, HALTED, MARGIN, OVERLAP, RISING, WEAK, Measured, verdict
from markdown import table
from verdicts import Verdict

TITLES = {"scifact": "SciFact", "cranfield": "Cranfield", "cisi": "CISI", "fiqa_mini": "fiqa_mini"}
PAPERS_SETS = {"scifact": "SciFact", "fiqa_mini": "FiQA2018"}
CLAIMS = {
    "C1": "the stability s_k rises with k",
    "C2": "stability tells of the ranking",
    "C3": "the same quality in fewer steps",
    "C4": "better than the fixed K of the same cost",
    "C5": "above the curve of fixed K",
    "C6": "M = 2 is more robust than M = 1",
    "C7": "k* does not follow the difficulty of a query",
    "G6": "with a cache, K = 20 costs 1.0 to 1.1 of one pass",
    "G8": "soft tokens follow the instruction",
    "G9": "the embedding follows the instruction",
}
NOT_RUN = "Not run."
_CERTIFIED = {
    "jaccard": "loss of Jaccard@10 below {:g} %",
    "ndcg": "loss of nDCG@10 below {:g} points",
    "percentile": "nothing: the paper's percentile",
}
_WAYS = {"one pass": "one pass", "gircse_no_cache": "without cache", "gircse_cache": "with cache"}


def estimate(found: Mapping[str, float] | None, *, signed: bool = False, digits: int = 2) -> str:
    """Show a number with its interval."""
    if found is None:
        return ""
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    return f"{form.format(found['value'])} ({form.format(found['low'])} to {form.format(found['high'])})"


def main_table(results: Measured) -> str:
    """Return table 1, the paper's beside ours."""
    rows = []
    for one in results.sets:
        theirs = results.paper.get("table1", {}).get(PAPERS_SETS.get(one.name, ""))
        for row in one.table("main"):
            rows.append([TITLES[one.name], row["rule"], *_main_cells(row), _papers_row(row["rule"], theirs)])
    heads = ["set", "rule", "nDCG@10, %", "mean k*", "steps saved", "less K = 20", "less fixed K of its cost", "halts on", "paper"]
    return table(heads, rows)


def _main_cells(row: Mapping[str, Any]) -> list[str]:
    chosen = "" if row["chosen"] is None else f"{row['chosen']} of 5 splits"
    saved = f"{row['savings']:.1f} %"
    return [
        estimate(row["quality"]),
        f"{row['steps']:.2f}",
        saved,
        *(estimate(row[name], signed=True) for name in ("to_full", "to_budget")),
        chosen,
    ]


def _papers_row(rule: str, theirs: Mapping[str, Any] | None) -> str:
    if theirs is None:
        return ""
    if rule == HALTED:
        return f"{theirs['convergestop']['ndcg10']:.2f} at k* = {theirs['convergestop']['avg_k']:.2f}"
    if rule == "fixed K = 20":
        return f"{theirs['fixed_20']['ndcg10']:.2f}"
    return f"{theirs['fixed_budget']['ndcg10']:.2f} at K = {theirs['fixed_budget']['k']}" if rule == "fixed K = round(mean k*)" else ""


def certified(results: Measured) -> str:
    """Return what is certified on the training queries, and what it gives on the test queries."""
    found = next((one.value["certified"] for one in results.sets if "certified" in one.value), None)
    if found is None:
        return NOT_RUN
    rows = []
    for row in found["rules"]:
        bound = _CERTIFIED[row["chosen_by"]].format(100 * (row["bound"] or 0))
        rule = row["rule"]
        halting = f"threshold {rule['threshold']:.6f}, M = {rule['patience']}" if rule["rule"] == "ConvergeStop" else "never halts"
        share = f"{row['seconds_saved']:.0f} % of {row['seconds_ceiling']:.0f} %"
        losses = [estimate(row[name]) for name in ("jaccard_loss", "ndcg_loss")]
        rows.append([bound, halting, f"{row['mean_steps']:.2f}", f"{row['savings']:.1f} %", *losses, share])
    heads = ["certified", "rule", "mean k*", "steps saved", "Jaccard loss on the test, %", "nDCG@10 loss on the test, points"]
    return (
        f"{found['development_queries']} training queries choose, the {found['test_queries']} test queries measure; a bound holds with "
        f"probability {1 - found['delta']:g}.\n\n{table([*heads, 'seconds saved, of what can be'], rows)}"
    )


def patience(results: Measured) -> str:
    """Return table 2."""
    rows = []
    for one in results.sets:
        theirs = results.paper.get("table2_patience", {}).get(PAPERS_SETS.get(one.name, ""), {})
        for row in one.table("patience"):
            paper = theirs.get(f"M{row['patience']}") if row["equal"] == "threshold" else None
            beside = "" if paper is None else f"{paper['ndcg10']:.2f} at k* = {paper['avg_k']:.2f} ± {paper['std_k']:.2f}"
            cells = [estimate(row["quality"]), f"{row['steps']:.2f} ± {row['deviation']:.2f}", estimate(row["to_first"], signed=True)]
            rows.append([TITLES[one.name], row["equal"], str(row["patience"]), *cells, beside])
    return table(["set", "equal", "M", "nDCG@10, %", "k*", "less M = 1", "paper"], rows)


def premises(results: Measured) -> str:
    """Return both premises, with the null models."""
    rows = []
    for one in results.sets:
        medians = {row["states"]: f"{row['median']:.3f}" for row in one.table("premise1_correlation")}
        second = one.table("premise2")[9]
        theirs = results.paper.get("premises", {})
        beside = theirs.get("jaccard10_at_k10", {}).get(PAPERS_SETS.get(one.name, ""))
        paper = "" if beside is None else f"{theirs['spearman_k_vs_stability_median']:.1f}; {100 * beside:.1f}"
        across = f"{second['across']:+.3f}"
        rows.append(
            [TITLES[one.name], *(medians[name] for name in ("observed", "permuted", "random")), estimate(second["jaccard"]), across, paper]
        )
    heads = ["set", "correlation of k and s_k", "same states, any order", "random states", "Jaccard@10 at k = 10, %"]
    return table([*heads, "s_10 and Jaccard@10 over queries", "paper"], rows)


def other_rules(results: Measured) -> str:
    """Return every rule less the fixed K of the same mean, at two targets."""
    rows = []
    for one in results.sets:
        for row in one.table("rules"):
            if row["target"] in (3.0, 5.0, 10.0, None):
                target = "its own" if row["target"] is None else f"{row['target']:g}"
                cells = [f"{row['steps']:.2f}", estimate(row["to_curve"], signed=True), estimate(row["jaccard"])]
                rows.append([TITLES[one.name], target, row["family"], *cells])
    return table(["set", "target k*", "rule", "mean k*", "nDCG@10 less fixed K at the same mean", "Jaccard@10 with K = 20, %"], rows)


def documents(results: Measured) -> str:
    """Return what halting the documents does."""
    rows = [
        [TITLES[one.name], row["queries"], row["documents"], f"{row['query_steps']:.2f}", f"{row['document_steps']:.2f}", *_quality(row)]
        for one in results.sets
        for row in one.table("documents")
    ]
    return table(["set", "queries", "documents", "mean k*, queries", "mean k*, documents", "nDCG@10, %", "less K = 20 for all"], rows)


def _quality(row: Mapping[str, Any]) -> list[str]:
    return [estimate(row["quality"]), estimate(row["to_full"], signed=True)]


def clock(results: Measured) -> str:
    """Return seconds beside steps."""
    rows = []
    for one in results.sets:
        timed = any(part["name"] == "seconds" for section in one.value["sections"] for part in section["tables"])
        for row in one.table("seconds") if timed else []:
            share = f"{100 * row['saving'] / row['ceiling']:.0f} %" if row["ceiling"] > 0 else ""
            cells = [f"{row['texts']:,}", f"{row['steps']:.2f}", f"{row['iteration_saving']:.1f} %", f"{row['saving']:.1f} %"]
            rows.append([TITLES[one.name], row["role"], *cells, f"{row['ceiling']:.1f} %", share])
    heads = ["set", "texts", "number", "mean k*", "steps saved", "seconds saved", "most that can be", "share of it"]
    return table(heads, rows) if rows else NOT_RUN


def instructed(results: Measured) -> str:
    """Return both measurements of instructions."""
    if results.instructions is None:
        return NOT_RUN
    clustered, said = results.instructions["clustered"], results.instructions["said"]
    steps = [key for key in clustered["v_measure"][0] if key.isdecimal()]
    rows = [[row["aspect"], row["instruction"], *(f"{row[k]:.2f}" for k in steps)] for row in clustered["v_measure"]]
    spoken = [
        [name, row["aspect"], f"{row['paraphrase']:.1f}", f"{row['other']:.1f}", estimate(row, signed=True)]
        for name, found in said.items()
        if name != "texts"
        for row in found
    ]
    return (
        f"V-measure in percent of k-means on random halves of {clustered['texts']:,} tweets (SemEval 2016, task 6), mean of "
        f"{clustered['halves']} halves:\n\n{table(['labels', 'instruction for', *(f'K = {k}' for k in steps)], rows)}\n\n"
        f"Overlap (Jaccard, %) of the tokens said to {said['texts']} of them under an instruction with those under a paraphrase of it, and "
        f"under the other one:\n\n{table(['model', 'instruction for', 'paraphrase', 'other', 'difference'], spoken)}"
    )


def costs(results: Measured) -> str:
    """Return the cost of K = 20 beside one pass."""
    if not results.cost:
        return NOT_RUN
    shapes = results.cost[0]["paper"]
    lengths = sorted(
        {row["tokens"] for one in results.cost for row in one["rows"]} | {r["tokens"] for s in shapes.values() for r in s["rows"]}
    )
    columns: dict[str, dict[int, str]] = {
        f"{name}, operations": {row["tokens"]: f"{row['counted']:.3f}" for row in shape["rows"]} for name, shape in shapes.items()
    }
    for one in results.cost:
        columns[f"{one['model']} here, operations"] = {row["tokens"]: f"{row['counted']:.3f}" for row in one["rows"]}
        columns[f"{one['model']} here, seconds"] = {
            row["tokens"]: f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in one["rows"]
        }
    rows = [[str(length), *(own.get(length, "") for own in columns.values())] for length in lengths]
    least = "; ".join(f"{name} {shape['least_tokens_counted']} tokens" for name, shape in shapes.items())
    own = "; ".join(f"{one['model']} {one['least_tokens_counted']:,}" for one in results.cost)
    return (
        f"K = 20 as a multiple of one pass, with a cache; in brackets the smallest and the largest of the turns.\n\n"
        f"{table(['prompt tokens', *columns], rows)}\n\nOperations are at most 1.1 of one pass from: {least}; {own}."
    )


def table_6(results: Measured) -> str:
    """Return the paper's cost table beside what its configuration gives."""
    if not results.table6:
        return NOT_RUN
    rows = [
        [
            _WAYS[row["way"]] + (f", K = {row['steps']}" if row["steps"] else ""),
            str(row["tokens"]),
            f"{row['paper_tflops']:.2f}",
            f"{row['tflops']:.2f}",
            f"{row['tflops'] / row['paper_tflops'] - 1:+.1%}",
            f"{row['paper_memory']:.2f}",
            f"{row['memory_gib']:.2f}",
            f"{row['memory_gib'] / row['paper_memory'] - 1:+.1%}",
        ]
        for row in results.table6
    ]
    heads = ["Mistral-7B", "tokens", "paper, TFLOP", "ours", "", "paper, GB", "weights and cache, GiB", ""]
    return f"{table(heads, rows)}\n\n{_TABLE_6}"


def _comparisons(one: Verdict) -> list[list[str]]:
    if not one.comparisons:
        return [[one.claim, one.note, "", ""]]
    return [[one.claim, part.what, str(part.interval), part.state] for part in one.comparisons]


def _verdicts(judged: Mapping[str, Verdict], model: str) -> str:
    words = [[claim, CLAIMS[claim], f"**{one.word}**"] for claim, one in judged.items()]
    lines = [line for one in judged.values() for line in _comparisons(one)]
    rules = _RULES.format(margin=MARGIN, rising=RISING, overlap=OVERLAP, weak=WEAK, beyond=BEYOND)
    compared = table(["claim", "comparison", "value and 95 % interval", "as claimed"], lines)
    return f"{table(['', 'claim', model], words)}\n\n{compared}\n\n{rules}"


def _prompt_weight() -> float:
    settings = Path(__file__).parents[1] / "genembed" / "builtin" / "mini" / "genembed.json"
    return float(json.loads(settings.read_text(encoding="utf-8"))["pooling"]["prompt_weight"])


def part_two(results: Measured, pictures: str) -> str:
    """Return the part as Markdown, its headings one level below that of the document."""
    judged = {claim: verdict(claim, results) for claim in CLAIMS}
    opening = _OPENING.format(model=results.model, weight=_prompt_weight())
    sections = {
        "Verdicts": _verdicts(judged, results.model),
        "Main results (table 1)": main_table(results),
        "A certificate from other queries": certified(results),
        "Quality and compute (figure 2)": f"![quality and compute]({pictures}/halting-tradeoff.png)\n\n{_ZOOMED}",
        "Patience (table 2)": patience(results),
        "Where it halts (figure 3)": f"![where it halts]({pictures}/halting-depths.png)",
        "Premises": premises(results),
        "Other rules at the same cost": other_rules(results),
        "Documents halted too": documents(results),
        "Seconds": clock(results),
        "Instructions": instructed(results),
        "What generation costs": costs(results),
        "The cost of a 7B model (GIRCSE, table 6)": table_6(results),
    }
    return "\n\n".join([opening.strip(), *(f"## {title}\n\n{text}" for title, text in sections.items())])


_OPENING = """
# Part 2: ConvergeStop, instructions, and what generation costs

Made by the same command from [result files](../benchmarks/results/halting) of `benchmarks/halting.py`, `instructions.py` and
`generation_cost.py`, with the built-in model `{model}`. The paper measures a 7-billion-weight model on NanoBEIR's 50 queries a set, 40
of them for the test; here a small model on the whole query sets, five random splits of the same 20/80. `{model}` pools the prompt with
the weight of {weight:g} generated states, so its embeddings move little and few steps are needed; the paper's model pools generated
states alone.
"""

_ZOOMED = """The axes are zoomed: the interval of a level is several points wide, and what these queries can tell are the paired
differences in the tables."""

_RULES = """Rules (`benchmarks/halting_verdicts.py`): intervals are over queries, paired, at 95 %. C1: the median correlation is at
least {rising:g}, and above that of random states by more than {beyond:g}. C2: Jaccard@10 above {overlap:g} %, and a positive
correlation over queries. C3: not worse than K = 20 by more than {margin:g} points. C7: 0 is in the interval and
±{weak:g} is not. G6: at most 1.1 of one pass. The words are those of part 1."""

_TABLE_6 = """Counted from the configuration alone (`genembed cost`). The paper's operations are those of linear layers, the output
layer at every position; attention is left out, as profilers of modules do, and so is the average of the embeddings. Its memory is the peak
of a run: half-precision weights, keys and values, and what the run itself keeps for the moment (states of all layers, logits at all
positions, the allocator's reserve), which no configuration tells; one pass has more of that there than refinement has. What is listed
here is the part that must be there."""
