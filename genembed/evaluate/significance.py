"""Whether two runs differ by more than the choice of queries would explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata  # type: ignore[import-untyped, unused-ignore]
from sklearn.metrics import average_precision_score  # type: ignore[import-untyped, unused-ignore]

from genembed.errors import DataError
from genembed.evaluate.items import AVERAGE_PRECISION, MEAN, SPEARMAN, Items, read_items

_DRAWS = 2_000
_CELLS = 1 << 22
"""Numbers of one block of draws in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The second run against the first on one task."""

    task: str
    metric: str
    items: int
    first: float
    second: float
    low: float
    high: float
    """95 % interval of `second - first`; what lies outside of it is not explained by the choice of items."""

    @property
    def significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def compare(first: Path, second: Path, *, draws: int = _DRAWS, seed: int = 0) -> list[Difference]:
    """Compare two runs on every task that both have scores of single items for.

    Args:
        first: Folder of the results of one run.
        second: That of the other.
        draws: Bootstrap samples.
        seed: Of the samples.

    Raises:
        DataError: If a folder has no such scores, the runs have no task in common, or their data differ.
    """
    ours, theirs = read_items(first), read_items(second)
    tasks = [task for task in ours if task in theirs]
    if not tasks:
        raise DataError(f"{first} and {second} have no task in common ({', '.join(ours)}; {', '.join(theirs)}).")
    return [paired_bootstrap(ours[task], theirs[task], draws=draws, seed=seed) for task in tasks]


def paired_bootstrap(first: Items, second: Items, *, draws: int = _DRAWS, seed: int = 0) -> Difference:
    """Draw items with replacement, the same for both runs, and take the percentiles of the difference of the scores.

        [q_0.025, q_0.975] of  score(second[I_b]) - score(first[I_b]),  b = 1 .. draws       (Efron and Tibshirani 1993, section 13.3)

    Args:
        first: Items of one run.
        second: The same items of the other.
        draws: B, at least 1.
        seed: Of the draws.

    Raises:
        DataError: If the runs are not of the same items.
    """
    if (first.revision, first.ids, first.gold, first.metric) != (second.revision, second.ids, second.gold, second.metric):
        raise DataError(f"{first.task}: the two runs are not of the same data; evaluate both again.")
    values = np.array([first.values, second.values])
    gold = np.zeros(values.shape[1]) if first.gold is None else np.array(first.gold)
    score = _STATISTICS[first.statistic]
    generator = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    size = max(1, min(draws, _CELLS // values.shape[1]))
    for start in range(0, draws, size):
        drawn = generator.integers(0, values.shape[1], (min(size, draws - start), values.shape[1]))
        found.append(score(values[1][drawn], gold[drawn]) - score(values[0][drawn], gold[drawn]))
    # A draw whose items all have one label has no score.
    low, high = np.nanpercentile(np.concatenate(found), [2.5, 97.5])
    ours, theirs = (float(score(row[None], gold[None])[0]) for row in values)
    return Difference(
        task=first.task, metric=first.metric, items=len(first.ids), first=ours, second=theirs, low=float(low), high=float(high)
    )


def _mean(values: Float[np.ndarray, "draws items"], _: Float[np.ndarray, "draws items"]) -> Float[np.ndarray, "draws"]:
    return np.asarray(values.mean(axis=1))


def _spearman(values: Float[np.ndarray, "draws items"], gold: Float[np.ndarray, "draws items"]) -> Float[np.ndarray, "draws"]:
    """Pearson's correlation of the ranks; NaN where all are equal."""
    ranks = [rankdata(each, axis=1) for each in (values, gold)]
    centred = [each - each.mean(axis=1, keepdims=True) for each in ranks]
    spread = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    shared = (centred[0] * centred[1]).sum(axis=1)
    return np.asarray(np.divide(shared, spread, out=np.full_like(shared, np.nan), where=spread > 0))


def _average_precision(values: Float[np.ndarray, "draws items"], gold: Float[np.ndarray, "draws items"]) -> Float[np.ndarray, "draws"]:
    """NaN where no pair is positive."""
    return np.array([average_precision_score(own, row) if own.any() else np.nan for own, row in zip(gold, values, strict=True)])


_STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    MEAN: _mean,
    SPEARMAN: _spearman,
    AVERAGE_PRECISION: _average_precision,
}
