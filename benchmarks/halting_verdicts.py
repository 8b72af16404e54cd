"""What the results of halting.py, instructions.py and generation_cost.py say about the papers' claims, by rules that are written here.

Every comparison has its interval over queries, as the result file has it; a claim is judged as in verdicts.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verdicts import Comparison, Interval, Verdict, judged

MARGIN = 0.5
"""Points of nDCG@10 that a halted embedding may be worse and still be called as good."""
RISING, BEYOND = 0.99, 0.05
"""Median correlation of k and s_k that is called monotone, and how far it must be above that of random states to be the model's."""
OVERLAP = 70.0
"""Jaccard@10 in percent at k = 10 that the paper asks for."""
WEAK = 0.2
"""Correlation that is called none, if 0 is in its interval and this is not."""
SETS = ("scifact", "cranfield", "cisi", "fiqa_mini")
"""On which halting is judged."""
TIMED = ("mini", "qwen")
"""Models whose generation was timed."""
LIMIT = 1.1
"""Cost of K = 20 that the paper claims, in passes."""
HALTED = "ConvergeStop M = 2, percentile"

Table = list[dict[str, Any]]


@dataclass(frozen=True)
class SetResult:
    """The result file of one set."""

    name: str
    value: Mapping[str, Any]

    def table(self, name: str) -> Table:
        """Return the rows of a table of the report."""
        return next(one["rows"] for section in self.value["sections"] for one in section["tables"] if one["name"] == name)

    @property
    def queries(self) -> int:
        """How many there are."""
        return int(self.value["settings"]["queries"])

    @property
    def halted(self) -> dict[str, Any] | None:
        """The main row of the paper's rule; None where it never halts."""
        row = next(row for row in self.table("main") if row["rule"] == HALTED)
        return row if row["chosen"] else None


@dataclass(frozen=True)
class Measured:
    """All results of part 2."""

    model: str
    sets: tuple[SetResult, ...]
    instructions: Mapping[str, Any] | None
    cost: tuple[Mapping[str, Any], ...]
    paper: Mapping[str, Any]
    table6: tuple[Mapping[str, Any], ...] = ()
    """Rows of GIRCSE's table 6, the paper's and ours."""

    @classmethod
    def read(cls, results: Path, model: str) -> Measured:
        """Read what is there."""
        halting = {name: results / "halting" / f"{model}-{name}.json" for name in SETS}
        told = results / "instructions" / f"{model}.json"
        return cls(
            model,
            tuple(SetResult(name, _json(path)) for name, path in halting.items() if path.is_file()),
            _json(told) if told.is_file() else None,
            tuple(_json(path) for name in TIMED if (path := results / "generation_cost" / f"{name}.json").is_file()),
            _json(results / "halting" / "paper.json") if (results / "halting" / "paper.json").is_file() else {},
            tuple(_json(table6)) if (table6 := results / "generation_cost" / "table6.json").is_file() else (),
        )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _of(value: Mapping[str, float]) -> Interval:
    return Interval(value["value"], value["low"], value["high"])


def _above(what: str, found: Interval, border: float = 0.0) -> Comparison:
    return Comparison(what, found, "yes" if found.low > border else "no" if found.high < border else "open")


def rises(results: Measured) -> Iterator[Comparison]:
    """C1: s_k rises with k, and more so than that of random states."""
    for one in results.sets:
        rows = {row["states"]: row for row in one.table("premise1_correlation")}
        observed, random = rows["observed"], rows["random"]
        quantile = Interval(observed["median"], observed["low"], 1.0)
        yield Comparison(f"{one.name}: median correlation of k and s_k", quantile, "yes" if observed["median"] >= RISING else "no")
        beyond = observed["median"] - random["median"]
        yield Comparison(f"{one.name}: beyond random states", Interval(beyond, beyond, beyond), "yes" if beyond > BEYOND else "no")


def tells_ranking(results: Measured) -> Iterator[Comparison]:
    """C2: the results at k = 10 are nearly the last ones, and s_10 tells for which queries."""
    for one in results.sets:
        row = one.table("premise2")[9]
        yield _above(f"{one.name}: Jaccard@10 at k = 10, %", _of(row["jaccard"]), OVERLAP)
        yield _above(f"{one.name}: correlation over queries of s_10 and Jaccard@10", correlation(row["across"], one.queries))


def correlation(value: float, count: int) -> Interval:
    """Return a rank correlation with the 95 % interval of Fisher's transformation."""
    place, width = math.atanh(max(min(value, 1 - 1e-9), -1 + 1e-9)), 1.96 / math.sqrt(count - 3)
    return Interval(value, math.tanh(place - width), math.tanh(place + width))


def same_quality(results: Measured) -> Iterator[Comparison]:
    """C3: fewer steps, and not worse by more than the margin."""
    for one, row in _halting(results):
        yield _above(f"{one.name}: less K = 20, at {row['savings']:.0f} % fewer steps", _of(row["to_full"]), -MARGIN)


def beats_budget(results: Measured) -> Iterator[Comparison]:
    """C4: above the fixed K of the same cost."""
    for one, row in _halting(results):
        what = f"{one.name}: less fixed K of its cost; {one.queries} queries here, {row['needed']:,} would tell +0.2"
        yield _above(what, _of(row["to_budget"]))


def above_curve(results: Measured) -> Iterator[Comparison]:
    """C5: above the curve through the paper's fixed K."""
    for one, _ in _halting(results):
        yield _above(f"{one.name}: less the curve at the same mean k*", _of(one.table("distance")[0]["distance"]))


def patience_helps(results: Measured) -> Iterator[Comparison]:
    """C6: at the same mean k*, M = 2 is above M = 1."""
    for one, _ in _halting(results):
        row = next(row for row in one.table("patience") if row["equal"] == "mean k*" and row["patience"] == 2)
        yield _above(f"{one.name}: M = 2 less M = 1 at the same mean k*", _of(row["to_first"]))


def difficulty_is_not_followed(results: Measured) -> Iterator[Comparison]:
    """C7: k* has no correlation with what further refinement would change."""
    for one, _ in _halting(results):
        values = [row["correlation"] for row in one.table("difficulty") if row["correlation"] is not None]
        if values:
            found = correlation(sum(values) / len(values), round(0.8 * one.queries))
            state = "no" if found.low > 0 or found.high < 0 else "yes" if max(-found.low, found.high) < WEAK else "open"
            yield Comparison(f"{one.name}: correlation of k* and difficulty, mean over splits", found, state)  # type: ignore[arg-type]


def _halting(results: Measured) -> Iterator[tuple[SetResult, dict[str, Any]]]:
    for one in results.sets:
        if one.halted is not None:
            yield one, one.halted


def costs_one_pass(results: Measured) -> Iterator[Comparison]:
    """G6: at most 1.1 of one pass, in operations as the paper counts and in seconds."""
    border = 100 * (LIMIT - 1)
    if results.cost:
        for name, shape in results.cost[0]["paper"].items():
            for row in shape["rows"]:
                if row["tokens"] in (128, 512, 2048):
                    more = 100 * (row["counted"] - 1)
                    found = Interval(more, more, more)
                    yield Comparison(
                        f"{name}, {row['tokens']} tokens: operations beyond one pass, %", found, "yes" if more <= border else "no"
                    )
    for one in results.cost:
        for row in one["rows"]:
            if row["tokens"] in (128, one["rows"][-1]["tokens"]):
                found = Interval(*(100 * (row[key] - 1) for key in ("ratio", "low", "high")))
                state = "yes" if found.high <= border else "no" if found.low > border else "open"
                yield Comparison(f"{one['model']} here, {row['tokens']} tokens: seconds beyond one pass, %", found, state)  # type: ignore[arg-type]


def tokens_follow(results: Measured) -> Iterator[Comparison]:
    """G8: more of the same tokens under a paraphrase than under another instruction."""
    if results.instructions is not None:
        for row in results.instructions["said"]["trained"]:
            yield _above(f"{row['aspect']}: overlap under a paraphrase less that under the other instruction, %", _of(row))


def instructions_are_followed(results: Measured) -> Iterator[Comparison]:
    """G9: refinement under the instruction brings out the aspect."""
    if results.instructions is not None:
        for row in results.instructions["clustered"]["differences"]:
            yield _above(row["what"], _of(row))


RULES: Mapping[str, Callable[[Measured], Iterator[Comparison]]] = {
    "C1": rises,
    "C2": tells_ranking,
    "C3": same_quality,
    "C4": beats_budget,
    "C5": above_curve,
    "C6": patience_helps,
    "C7": difficulty_is_not_followed,
    "G6": costs_one_pass,
    "G8": tokens_follow,
    "G9": instructions_are_followed,
}


def verdict(claim: str, results: Measured) -> Verdict:
    """Return what becomes of a claim, or that its results are not there."""
    missing = [name for name in SETS if name not in {one.name for one in results.sets}]
    if claim.startswith("C") and missing:
        return Verdict(claim, "not run", note=f"not run: {', '.join(missing)}")
    comparisons = tuple(RULES[claim](results))
    return judged(claim, comparisons) if comparisons else Verdict(claim, "not run", note="not run")
