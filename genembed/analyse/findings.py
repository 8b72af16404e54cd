"""Everything that is measured of a model on a retrieval set, from one refinement of the queries and one of the documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from genembed.analyse.documents import Corpus, Halting, halted_documents
from genembed.analyse.intervals import Bootstrap, Estimate, estimate
from genembed.analyse.kept import Kept, keep
from genembed.analyse.premises import Agreement, Rise, agreement, rises
from genembed.analyse.rules import Oracle, Rule, converge_stop, families, steps_under
from genembed.analyse.splits import GRID, Arm, Comparison, Result, Splits
from genembed.analyse.states import States, record
from genembed.analyse.timing import Seconds, seconds
from genembed.calibrate.development import full_steps
from genembed.embedder import Embedder
from genembed.errors import ConfigurationError
from genembed.halting import ConvergeStop, FixedSteps
from genembed.testsets import RetrievalSet

PATIENCES = (1, 2, 3)

_SAME = 0.25
"""Mean steps further apart than this are not the same cost."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked for."""

    instruction: str | None = None
    """Of the queries; the model's own one if None."""
    max_steps: int | None = None
    """K; the most steps of the model's own rule if None."""
    halt_documents: bool = False
    """Whether documents are halted as well, which keeps `4 * hidden * K` bytes of each."""
    repeats: int = 3
    """Turns in which seconds are measured; 0 measures none."""
    seed: int = 0
    """Of splits, resamples and null models."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.repeats < 0:
            raise ConfigurationError(f"repeats={self.repeats}: at least 0 turns, which measures no seconds.")
        if self.seed < 0:
            raise ConfigurationError(f"seed={self.seed}: a number of at least 0 is needed.")


@dataclass(frozen=True)
class Row:
    """A line of the main table."""

    result: Result
    chosen: int | None
    """On how many splits a rule that can halt was chosen; None for fixed steps."""
    to_budget: Estimate | None
    """Quality less that of the fixed K of the same cost; None for fixed steps."""
    needed: int | None
    """Test queries that would tell such a difference of `EFFECT` from none; None for fixed steps."""


@dataclass(frozen=True)
class PatienceRow:
    """One M of the patience table."""

    equal: str
    """What is the same for every M: the threshold, or mean k*."""
    patience: int
    """M."""
    result: Result
    to_first: Estimate | None
    """Quality less that of M = 1; None for M = 1 itself."""


@dataclass(frozen=True)
class RuleRow:
    """A rule at a mean number of steps, on all queries."""

    target: float | None
    """Mean steps asked for; None where the rule has no number to choose."""
    family: str
    rule: Rule
    result: Result
    jaccard: Estimate
    """Jaccard@10 with the results of step K."""
    to_converge_stop: Estimate | None
    """Quality less that of ConvergeStop at the same target; None where their mean steps differ."""


@dataclass(frozen=True)
class SplitRow:
    """A split, and what the halting rule did on its test queries."""

    split: int
    rule: ConvergeStop | FixedSteps
    steps: float
    deviation: float
    correlation: float
    """Spearman of k* and difficulty; NaN where one of them is constant."""
    p_value: float


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found."""

    kept: Kept
    rises: list[Rise]
    agreement: Agreement
    main: list[Row]
    halting: Arm
    """The arm that figures 2 and 3, the patience table and the seconds are about."""
    halting_result: Result
    to_papers_curve: Estimate
    """Its quality less that of the curve through the paper's K."""
    curve: list[Estimate]
    """Quality at K = 1, 2, ... on the test queries."""
    patience: list[PatienceRow]
    splits: list[SplitRow]
    depths: Float[np.ndarray, "steps"]
    """Share of test queries that halt at k* = 1 .. K, mean over splits."""
    rules: list[RuleRow]
    documents: list[Halting]
    """Empty unless asked for."""
    seconds: dict[str, Seconds]
    """Of the queries, and the documents if those are halted; empty unless asked for."""
    timed: ConvergeStop | None
    """The rule whose seconds were measured."""


def find(model: Embedder, data: RetrievalSet, settings: Settings, *, show_progress_bar: bool = False) -> Findings:
    """Refine everything to the end once, and replay the rest.

    Raises:
        ConfigurationError: If the model does not refine or pools its newest state alone, or the set is too small.
    """
    steps = full_steps(model, data, settings.max_steps)
    splits = Splits.of(len(data.queries), seed=settings.seed)
    instruction = model.settings.query_instruction if settings.instruction is None else settings.instruction
    queries, texts = list(data.queries.values()), list(data.documents.values())
    states = record(model, queries, instruction=instruction, steps=steps, show_progress_bar=show_progress_bar)
    refined = model.refine(
        texts,
        instruction=model.settings.document_instruction,
        halt=FixedSteps(steps),
        keep_trajectory=settings.halt_documents,
        show_progress_bar=show_progress_bar,
    )
    kept = keep(states, refined.vectors, data)
    comparison = Comparison(kept, splits, Bootstrap.of(len(kept), seed=settings.seed))
    documents = None if refined.trajectory is None else Corpus(data, states.vectors, refined.trajectory, refined.stability)
    found = _replayed(comparison, states, documents, seed=settings.seed)
    rule = next((one for one in found.halting.rules if isinstance(one, ConvergeStop)), None)
    if not settings.repeats or rule is None:
        return found
    timed = {"queries": seconds(model, queries, rule, instruction=instruction, steps=steps, repeats=settings.repeats)}
    if settings.halt_documents:
        own = model.settings.document_instruction
        timed["documents"] = seconds(model, texts, rule, instruction=own, steps=steps, repeats=settings.repeats)
    return replace(found, seconds=timed, timed=rule)


def _replayed(comparison: Comparison, states: States, documents: Corpus | None, *, seed: int) -> Findings:
    kept = comparison.kept
    main, halting = _main(comparison, seed=seed)
    return Findings(
        kept=kept,
        rises=rises(states, seed=seed),
        agreement=agreement(kept, comparison.bootstrap),
        main=main,
        halting=halting,
        halting_result=comparison.measure(halting),
        to_papers_curve=comparison.to_curve(halting, grid(kept.steps)),
        curve=comparison.curve,
        patience=list(_patience(comparison, halting)),
        splits=list(_splits(comparison, halting)),
        depths=_depths(comparison, halting.steps),
        rules=list(_rules(comparison)),
        documents=[] if documents is None else halted_documents(documents, comparison, halting),
        seconds={},
        timed=None,
    )


def grid(steps: int) -> tuple[int, ...]:
    """Return the paper's fixed K up to K, and K."""
    return tuple(sorted({*(k for k in GRID if k < steps), steps}))


def _main(comparison: Comparison, *, seed: int) -> tuple[list[Row], Arm]:
    """Return the main table, and the arm that the figures are about: the first that halts anything."""
    judged = comparison.kept.development.ndcg is not None
    halting = [*([comparison.percentile()] if judged else []), comparison.certified(seed=seed)]
    rows = [_row(comparison, comparison.full()), _row(comparison, comparison.developed())]
    for arm in halting:
        rows.append(_row(comparison, arm))
        if arm.chosen:
            rows += [_row(comparison, comparison.budget(arm)), _row(comparison, comparison.quantile(arm))]
    shown = next((arm for arm in halting if arm.chosen), None)
    return rows, _half(comparison) if shown is None else shown


def _row(comparison: Comparison, arm: Arm) -> Row:
    if not arm.rules:
        return Row(comparison.measure(arm), None, None, None)
    budget = comparison.budget(arm)
    return Row(comparison.measure(arm), arm.chosen, comparison.difference(arm, budget), comparison.queries_needed(arm, budget))


def _half(comparison: Comparison) -> Arm:
    """Return ConvergeStop at half of the steps, where nothing was chosen that halts."""
    rule = converge_stop(2, comparison.kept.steps).matched(comparison.kept, comparison.kept.steps / 2)
    assert isinstance(rule, ConvergeStop)
    return comparison.halted("ConvergeStop M = 2 at half of the steps", [rule] * len(comparison.splits))


def _patience(comparison: Comparison, arm: Arm) -> Iterator[PatienceRow]:
    for equal, rules_of in (("threshold", _same_threshold), ("mean k*", _same_mean)):
        arms = [comparison.halted(f"M = {m}", rules_of(comparison, arm, m)) for m in PATIENCES]
        for m, own in zip(PATIENCES, arms, strict=True):
            yield PatienceRow(equal, m, comparison.measure(own), None if m == 1 else comparison.difference(own, arms[0]))


def _same_threshold(_: Comparison, arm: Arm, m: int) -> list[ConvergeStop | FixedSteps]:
    return [replace(rule, patience=m) if isinstance(rule, ConvergeStop) else rule for rule in arm.rules]


def _same_mean(comparison: Comparison, arm: Arm, m: int) -> list[ConvergeStop | FixedSteps]:
    """Match the threshold to the mean k* of each split's test queries."""
    matched: list[ConvergeStop | FixedSteps] = []
    for own, test in zip(arm.steps, comparison.splits.test, strict=True):
        rule = converge_stop(m, comparison.kept.steps).matched(comparison.kept.select(np.flatnonzero(test)), float(own[test].mean()))
        assert isinstance(rule, ConvergeStop)
        matched.append(rule)
    return matched


def _splits(comparison: Comparison, arm: Arm) -> Iterator[SplitRow]:
    difficulty = comparison.kept.quality[:, -1] - comparison.kept.quality[:, 0]
    for split, (rule, steps, test) in enumerate(zip(arm.rules, arm.steps, comparison.splits.test, strict=True)):
        own, hard = steps[test], difficulty[test]
        constant = (own == own[0]).all() or (hard == hard[0]).all()  # SciPy warns of them
        correlation, p_value = (float("nan"), float("nan")) if constant else spearmanr(own, hard)
        yield SplitRow(split + 1, rule, float(own.mean()), float(own.std()), float(correlation), float(p_value))


def _depths(comparison: Comparison, steps: Int[np.ndarray, "splits queries"]) -> Float[np.ndarray, "steps"]:
    counts = [
        np.bincount(own[test] - 1, minlength=comparison.kept.steps) / test.sum()
        for own, test in zip(steps, comparison.splits.test, strict=True)
    ]
    return np.asarray(np.mean(counts, axis=0))


def _rules(comparison: Comparison) -> Iterator[RuleRow]:
    """Compare the rules on all queries: their numbers are matched to a mean, and read no judgement that a split would have to hide."""
    kept, every = comparison.kept, replace(comparison, splits=Splits(np.ones((1, len(comparison.kept)), dtype=bool)))
    for target in grid(kept.steps)[1:-1]:
        first: Arm | None = None
        for family in families(kept.steps):
            rule = family.matched(kept, float(target))
            arm = Arm(family.name, steps_under(kept, rule)[None])
            first = first or arm
            comparable = arm is not first and abs(arm.steps.mean() - first.steps.mean()) <= _SAME
            yield _rule_row(every, arm, rule, float(target), every.difference(arm, first) if comparable else None)
    oracle = Arm("oracle", steps_under(kept, Oracle())[None])
    yield _rule_row(every, oracle, Oracle(), None, None)


def _rule_row(every: Comparison, arm: Arm, rule: Rule, target: float | None, other: Estimate | None) -> RuleRow:
    agreed = every.kept.development.jaccard[np.arange(len(every.kept)), arm.steps[0] - 1]
    return RuleRow(target, arm.name, rule, every.measure(arm), estimate(every.bootstrap.means(agreed)), other)
