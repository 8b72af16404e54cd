"""Which halting rule to take: the paper's percentile, or the boldest one that development queries certify."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from genembed.calibrate.betting import SIGNED, UNIT, LossRange, certified, check_bound, queries_needed
from genembed.calibrate.development import Development
from genembed.calibrate.replay import halting_steps
from genembed.errors import ConfigurationError
from genembed.halting import ConvergeStop, FixedSteps

Loss = Literal["ndcg", "jaccard"]

RANGES: dict[str, LossRange] = {"ndcg": SIGNED, "jaccard": UNIT}

REFERENCES = (1, 2, 3, 5, 7, 9, 12, 15)
"""Steps r whose stability cos(z_r, z_{r+1}) gives thresholds."""
PERCENTILES = (5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0)
"""Percentiles p of it."""

THRESHOLDS = tuple(1 - 10 ** (-6 + 0.125 * place) for place in range(45))
"""From 0.999999 down to 0.68: fixed before any query is seen, as the guarantee asks. Their number costs nothing."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A rule and what it gives on the development queries."""

    rule: ConvergeStop
    source: str
    """Where the threshold comes from."""
    mean_steps: float
    """Mean k*."""
    quality: float | None
    """Mean nDCG@10 in [0, 1]; None without judgements."""
    agreement: float
    """Mean Jaccard@10 with the results of the full refinement."""
    budget: int
    """The fixed K of the same cost, round(mean k*)."""
    budget_quality: float | None
    """Mean nDCG@10 at that K."""
    decision: str
    """Chosen, or why not."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What calibration found."""

    rule: ConvergeStop | FixedSteps
    """The rule to use; refinement to the end where none could be chosen."""
    candidates: tuple[Candidate, ...]
    """From the safest to the boldest."""
    reason: str
    """Why this rule."""
    queries_needed: int | None = None
    """Where nothing was certified: about how many queries would do for the safest rule that saves a step; None if no number would,
    or a rule was chosen."""


def by_percentile(
    development: Development,
    *,
    epsilon: float = 0.005,
    patience: int = 2,
    min_steps: int = 1,
    references: Sequence[int] = REFERENCES,
    percentiles: Sequence[float] = PERCENTILES,
) -> Choice:
    """Choose a threshold as the paper does.

        tau = percentile_p( cos(z_r, z_{r+1}) )                                       (ConvergeStop, section 3.4, equation 3)

    Of the configurations (r, p) whose quality is within `epsilon` of the best and above that of the fixed K of the same cost, the one
    with the fewest steps. No guarantee goes with it: chosen on the queries it is measured on, it breaks its own bound often
    (benchmarks/calibration.py); `by_certificate` does not.

    Args:
        development: Queries with judgements.
        epsilon: Loss of nDCG@10, in [0, 1], that is accepted.
        patience: M.
        min_steps: k_min.
        references: Steps r.
        percentiles: p, in percent.

    Raises:
        ConfigurationError: If there are no judgements, or a setting has no meaning.
    """
    if development.ndcg is None:
        raise ConfigurationError("the percentile rule compares nDCG@10: give judgements (qrels), or certify Jaccard@10, which needs none.")
    if not 0 <= epsilon < 1:
        raise ConfigurationError(f"epsilon={epsilon!r}: a loss of nDCG@10 in [0, 1) is needed, for example 0.005 for half a point.")
    if not len(development):
        raise ConfigurationError("there are no development queries.")
    found: dict[float, str] = {}
    for reference in (r for r in references if r < development.max_steps):
        for percentile in percentiles:
            threshold = float(np.percentile(development.stability[:, reference - 1], percentile))
            found.setdefault(threshold, f"r = {reference}, p = {percentile:g}")
    candidates = [
        _candidate(development, _rule(development, threshold, patience, min_steps), source)
        for threshold, source in sorted(found.items(), reverse=True)
    ]
    best = max(float(development.ndcg.mean(axis=0).max()), *(c.quality or 0.0 for c in candidates))
    judged = [replace(one, decision=_verdict(one, best - epsilon)) for one in candidates]
    kept = [one for one in judged if not one.decision]
    if not kept:
        reason = "no configuration is within epsilon of the best and above the fixed K of its cost: every text is refined to the end."
        return Choice(rule=FixedSteps(development.max_steps), candidates=tuple(judged), reason=reason)
    chosen = min(kept, key=lambda one: one.mean_steps)
    done = tuple(replace(one, decision="chosen" if one is chosen else one.decision or "more steps") for one in judged)
    return Choice(
        rule=chosen.rule, candidates=done, reason="the fewest steps within epsilon of the best and above the fixed K of its cost."
    )


def by_certificate(
    development: Development,
    *,
    loss: Loss,
    epsilon: float,
    delta: float = 0.1,
    patiences: Sequence[int] = (2,),
    min_steps: int = 1,
    thresholds: Sequence[float] = THRESHOLDS,
    seed: int = 0,
) -> Choice:
    """Choose the boldest rule whose loss against full refinement is certified.

    Thresholds are tested from the safest to the boldest until one fails (`betting.certified`), one chain for each patience at
    delta divided by their number. With probability at least 1 - delta over the development queries, the mean loss of the chosen rule over
    queries like them is below epsilon.

    Args:
        development: Queries; with judgements for `loss="ndcg"`.
        loss: `ndcg`, nDCG@10 of the full refinement less that of the halted one; `jaccard`, 1 - Jaccard@10 of the two result lists.
        epsilon: The bound, in (0, 1).
        delta: Chance that the bound does not hold.
        patiences: M of each chain.
        min_steps: k_min.
        thresholds: From the safest to the boldest, fixed before these queries were seen.
        seed: Of the order in which queries are read.

    Raises:
        ConfigurationError: If there are no judgements for `ndcg`, or a setting has no meaning.
    """
    within = _range(loss, development)
    check_bound(epsilon, delta, within)
    if not len(patiences) or list(thresholds) != sorted(thresholds, reverse=True):
        raise ConfigurationError("thresholds must fall, from the safest to the boldest, and at least one patience is needed.")
    share = delta / len(patiences)
    chains = {m: [_rule(development, threshold, m, min_steps) for threshold in thresholds] for m in patiences}
    kept: list[Candidate] = []
    shown: list[Candidate] = []
    hints: list[int | None] = []
    for patience, rules in chains.items():
        losses = np.stack([losses_of(development, rule, loss) for rule in rules], axis=1)
        count = certified(losses, epsilon=epsilon, delta=share, within=within, seed=seed)
        chain = [_candidate(development, rule, f"M = {patience}", "certified" if place < count else "") for place, rule in enumerate(rules)]
        chain = _distinct([replace(one, decision=one.decision or _refusal(losses[:, i], epsilon)) for i, one in enumerate(chain)])
        shown += chain
        kept += [one for one in chain if one.decision == "certified"]
        hints.append(_hint(development, losses, rules, epsilon=epsilon, delta=share, within=within))
    saving = [one for one in kept if one.mean_steps < development.max_steps]
    if not saving:
        known = [hint for hint in hints if hint is not None]
        needed = max(min(known), len(development) + 1) if known else None
        return Choice(
            rule=FixedSteps(development.max_steps),
            candidates=tuple(shown),
            reason=_shortage(len(development), needed, epsilon, delta, loss),
            queries_needed=needed,
        )
    chosen = min(saving, key=lambda one: one.mean_steps)
    done = tuple(replace(one, decision="chosen" if one is chosen else one.decision) for one in shown)
    reason = f"the fewest steps whose {loss} loss is certified below {epsilon:g} with probability {1 - delta:g}."
    return Choice(rule=chosen.rule, candidates=done, reason=reason)


def losses_of(development: Development, rule: ConvergeStop | FixedSteps, loss: Loss) -> Float[np.ndarray, "queries"]:
    """Return the loss of every query under a rule, against refining it to the end.

    Raises:
        ConfigurationError: If there are no judgements for `ndcg`.
    """
    _range(loss, development)
    rows, last = np.arange(len(development)), halting_steps(development.stability, rule) - 1
    if loss == "jaccard":
        return np.asarray(1 - development.jaccard[rows, last])
    assert development.ndcg is not None
    return np.asarray(development.ndcg[:, -1] - development.ndcg[rows, last])


def _range(loss: str, development: Development) -> LossRange:
    if loss not in RANGES:
        raise ConfigurationError(f"loss={loss!r}: choose ndcg or jaccard.")
    if loss == "ndcg" and development.ndcg is None:
        raise ConfigurationError("loss='ndcg' needs judgements (qrels); without them use loss='jaccard'.")
    return RANGES[loss]


def _rule(development: Development, threshold: float, patience: int, min_steps: int) -> ConvergeStop:
    return ConvergeStop(threshold=threshold, patience=patience, min_steps=min_steps, max_steps=development.max_steps)


def _candidate(development: Development, rule: ConvergeStop, source: str, decision: str = "") -> Candidate:
    steps = halting_steps(development.stability, rule)
    rows, budget = np.arange(len(development)), max(1, round(float(steps.mean())))
    ndcg = development.ndcg
    return Candidate(
        rule=rule,
        source=source,
        mean_steps=float(steps.mean()),
        quality=None if ndcg is None else float(ndcg[rows, steps - 1].mean()),
        agreement=float(development.jaccard[rows, steps - 1].mean()),
        budget=budget,
        budget_quality=None if ndcg is None else float(ndcg[:, budget - 1].mean()),
        decision=decision,
    )


def _verdict(candidate: Candidate, least: float) -> str:
    """Say what is against a percentile; nothing if it may be chosen."""
    quality, budget_quality = candidate.quality or 0.0, candidate.budget_quality or 0.0
    if quality < least:
        return "quality"
    return "" if quality > budget_quality else "not above fixed K"


def _refusal(losses: Float[np.ndarray, "queries"], epsilon: float) -> str:
    return "loss above the bound" if losses.mean() >= epsilon else "too few queries"


def _distinct(chain: list[Candidate]) -> list[Candidate]:
    """Keep the safest of rules that cost the same, and end the list a little after the last certified one."""
    kept = [one for one, before in zip(chain, [None, *chain], strict=False) if before is None or _differ(one, before)]
    ends = sum(one.decision == "certified" for one in kept)
    return kept[: ends + 4]


def _differ(one: Candidate, other: Candidate) -> bool:
    return not math.isclose(one.mean_steps, other.mean_steps) or one.decision != other.decision


def _hint(
    development: Development,
    losses: Float[np.ndarray, "queries candidates"],
    rules: Sequence[ConvergeStop],
    *,
    epsilon: float,
    delta: float,
    within: LossRange,
) -> int | None:
    """Return how many queries would certify the safest rule that saves something; None if no number would, or no rule saves."""
    for place, rule in enumerate(rules):
        if halting_steps(development.stability, rule).mean() < development.max_steps:
            return queries_needed(losses[:, place], epsilon=epsilon, delta=delta, within=within)
    return None


def _shortage(queries: int, needed: int | None, epsilon: float, delta: float, loss: Loss) -> str:
    bound = f"a {loss} loss below {epsilon:g} with probability {1 - delta:g}"
    if needed is None:
        return (
            f"{queries} queries do not certify {bound} for any rule that saves a step, nor would more like them: accept a larger epsilon."
        )
    return f"{queries} queries do not certify {bound}; about {needed} would. Until then every text is refined to the end."
