"""Hard negatives for files of pairs: passages of the same file that a frozen model finds near to a query, but not too near."""

from __future__ import annotations

import heapq
import json
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from genembed.errors import ConfigurationError, DataError
from genembed.train.durable import replace_parts
from genembed.train.overlap import TextFilter, normalised, text_hash
from genembed.train.pairs import BadRows, DataFile, Pair, is_scored, read_pairs

_COSINES = 1 << 24
"""Cosines in memory at once, 64 MiB of them."""

Embed = Callable[[Sequence[str]], np.ndarray]
"""From texts to their unit vectors, in order."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Mining:
    """Which of the passages near to a query become its negatives."""

    negatives: int = 4
    """At most so many are mined for a row."""
    skip: int = 0
    """The nearest so many are passed over, right answers not counted."""
    depth: int = 50
    """Negatives are among the nearest so many, those passed over included."""
    max_ratio: int | float = 0.95
    """Candidates are left out whose cosine is above this share of the positive's, > 0: they are likely right answers that nobody has
    labelled. At 1, those that are nearer than the positive."""
    nearest: bool = False
    """Take the nearest of what is left; otherwise draw at random."""
    keep_own: bool = True
    """Put the mined negatives after the row's own ones; otherwise in their place."""
    limit: int | None = None
    """At most so many rows of a file, drawn at random; None for all. With a larger limit the same ones stay and others join them."""
    seed: int = 0
    """Of both draws."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name, least in {"negatives": 1, "skip": 0, "depth": 1, "limit": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"{name}={value}: must be at least {least}.")
        if self.depth - self.skip < self.negatives:
            raise ConfigurationError(
                f"skip={self.skip} and depth={self.depth} leave {max(self.depth - self.skip, 0)} ranks for negatives={self.negatives}; "
                "use a larger depth."
            )
        if not 0 < self.max_ratio < math.inf:
            raise ConfigurationError(f"max_ratio={self.max_ratio}: a share above 0 is needed, for example 0.95.")


@dataclass(frozen=True, kw_only=True)
class Mined:
    """What was mined for one file."""

    source: str
    output: str
    """The written file."""
    rows: int
    """Rows written."""
    passages: int
    """Distinct positives that were searched."""
    negatives: int
    """Negatives mined, of all rows."""
    rows_without: int
    """Rows for which nothing was mined."""
    above_ratio: int
    """Candidates within the depth that `max_ratio` left out."""
    excluded: int
    """Rows left out as texts of a test set."""
    bad_rows: int
    """Rows left out because they cannot be used."""

    def __str__(self) -> str:
        """Say it on one line."""
        return (
            f"{self.output}: {self.rows} rows, {self.passages} passages, {self.negatives / self.rows:.2f} negatives mined for a row, "
            f"{self.rows_without} rows without any, {self.above_ratio} candidates too near, {self.excluded} rows excluded, "
            f"{self.bad_rows} bad rows"
        )


@dataclass(frozen=True)
class _Rows:
    """What is read of a file."""

    pairs: list[Pair]
    answers: dict[int, set[int]]
    """By the hash of a query, the hashes of the positives of all its rows, also of those that were not drawn."""
    excluded: int


@dataclass(frozen=True, eq=False)
class _Texts:
    """Texts, each once however it is set."""

    texts: list[str]
    places: dict[int, int]
    """By the hash of a text, its place."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> _Texts:
        distinct: dict[int, str] = {}
        for text in texts:
            distinct.setdefault(_hash(text), text)
        return cls(list(distinct.values()), {key: place for place, key in enumerate(distinct)})

    def find(self, hashes: Iterable[int]) -> list[int]:
        """Return the places of those texts that are here."""
        return [self.places[key] for key in hashes if key in self.places]


class _Query(NamedTuple):
    """What is known of a row's query."""

    vector: int
    """Place of its vector."""
    positives: list[int]
    """Places of the row's positives among the passages."""
    known: list[int]
    """Places of the passages that are no candidates."""


def mine(file: DataFile, output: Path, embed: Embed, mining: Mining, *, exclude: TextFilter | None = None) -> Mined:
    """Write the rows of a file with negatives found among the positives of its other rows.

        d is a candidate of q   if   cos(q, d) <= cos(q, d+) - (1 - max_ratio) |cos(q, d+)|

    which is max_ratio cos(q, d+) for any positive above 0 (TopK-PercPos of NV-Retriever, Moreira et al. 2024); of several positives
    d+ is the one with the lowest cosine. Never a candidate: a positive of any row with the same query, a text equal to the query, and
    a negative that the row keeps. Letters and digits are compared, without regard to case.

    The rows drawn from the file are held in memory, and for each of their distinct queries and passages a vector of
    4 * dimensions bytes.

    Args:
        file: Pairs without scores.
        output: A `.jsonl` file, {query, pos, neg, prompt, type}; it is complete or absent.
        embed: A frozen model; texts are read bare.
        mining: What is taken.
        exclude: Texts that must not be trained on: they are no candidates, and their rows are left out.

    Raises:
        ConfigurationError: If there is no such file, its pairs have scores, or `output` cannot be written.
        DataError: If the layout is unknown, or there is no usable row.
    """
    check_unscored(file)
    bad = BadRows()
    rows = _read(file, mining, exclude, bad)
    if bad.total or bad.texts:
        log.warning("%s", bad.report())
    if not rows.pairs:
        raise DataError(f"{file.path}: no row can be used: {bad.total} cannot be read, {rows.excluded} are excluded.")
    passages = _Texts.of(text for pair in rows.pairs for text in pair.positives)
    counts: Counter[str] = Counter()
    replace_parts(output, (f"{_line(pair)}\n" for pair in _with_negatives(rows, passages, embed, mining, counts)))
    return Mined(
        source=file.source,
        output=str(output),
        rows=len(rows.pairs),
        passages=len(passages.texts),
        negatives=counts["negatives"],
        rows_without=counts["rows_without"],
        above_ratio=counts["above_ratio"],
        excluded=rows.excluded,
        bad_rows=bad.total,
    )


def check_unscored(file: DataFile) -> None:
    """Refuse scored pairs.

    Raises:
        ConfigurationError: If there is no such file, or its pairs have scores.
        DataError: If the layout is unknown, or the file has no rows.
    """
    if is_scored(file):
        raise ConfigurationError(
            f"{file.path}: its pairs have scores, and the ranking loss compares them with each other alone: negatives would have no "
            "effect. Leave the file out."
        )


def _read(file: DataFile, mining: Mining, exclude: TextFilter | None, bad: BadRows) -> _Rows:
    answers: dict[int, set[int]] = defaultdict(set)
    excluded = 0

    def usable() -> Iterator[tuple[int, int, Pair]]:
        nonlocal excluded
        for line, read in read_pairs(file, bad):
            pair = read if exclude is None else exclude.clean(read, f"{file.path}, mining", line)
            if pair is None:
                excluded += 1
                continue
            answers[_hash(pair.query)].update(map(_hash, pair.positives))
            yield text_hash(f"mined {mining.seed} {line}"), line, pair

    drawn = usable() if mining.limit is None else heapq.nsmallest(mining.limit, usable(), key=lambda row: row[:2])
    pairs = [pair for _, _, pair in sorted(drawn, key=lambda row: row[1])]
    return _Rows(pairs, answers, excluded)


def _with_negatives(rows: _Rows, passages: _Texts, embed: Embed, mining: Mining, counts: Counter[str]) -> Iterator[Pair]:
    """Yield the pairs with their mined negatives, and count what was mined."""
    queries = _Texts.of(pair.query for pair in rows.pairs)
    asked = [
        _Query(
            queries.places[_hash(pair.query)],
            passages.find(map(_hash, pair.positives)),
            passages.find(_no_candidates(pair, rows.answers, keep_own=mining.keep_own)),
        )
        for pair in rows.pairs
    ]
    found = _search(_vectors(embed, queries.texts), _vectors(embed, passages.texts), asked, depth=mining.depth)
    rng = random.Random(mining.seed)
    for pair, (positive, candidates) in zip(rows.pairs, found, strict=True):
        within = candidates[mining.skip :]
        left = _far_enough(within, positive, mining.max_ratio)
        chosen = _chosen(left, mining, rng)
        counts.update(negatives=len(chosen), rows_without=not chosen, above_ratio=len(within) - len(left))
        mined = tuple(passages.texts[place] for place in chosen)
        yield replace(pair, negatives=(*pair.negatives, *mined) if mining.keep_own else mined)


def _search(
    queries: Float[Tensor, "queries hidden"], passages: Float[Tensor, "passages hidden"], asked: Sequence[_Query], *, depth: int
) -> Iterator[tuple[float, list[tuple[int, float]]]]:
    """Yield for each row the lowest cosine of its positives, then its nearest candidates with their cosines, nearest first.

    Every cosine is computed, a block of rows at a time.
    """
    size = max(1, _COSINES // len(passages))
    for start in range(0, len(asked), size):
        block = asked[start : start + size]
        cosines = queries[[query.vector for query in block]] @ passages.T
        positives = [float(row[query.positives].min()) for row, query in zip(cosines, block, strict=True)]
        for row, query in zip(cosines, block, strict=True):
            row[query.known] = -torch.inf
        values, places = cosines.topk(min(depth, len(passages)))
        for positive, row_places, row_values in zip(positives, places.tolist(), values.tolist(), strict=True):
            yield positive, [(place, value) for place, value in zip(row_places, row_values, strict=True) if value > -math.inf]


def _vectors(embed: Embed, texts: list[str]) -> Float[Tensor, "texts hidden"]:
    return torch.from_numpy(np.asarray(embed(texts), dtype=np.float32))


def _no_candidates(pair: Pair, answers: dict[int, set[int]], *, keep_own: bool) -> set[int]:
    """Return the hashes of texts that are right for a query, or that its row has as negatives already."""
    query = _hash(pair.query)
    return answers[query] | {query} | (set(map(_hash, pair.negatives)) if keep_own else set())


def _far_enough(candidates: list[tuple[int, float]], positive: float, max_ratio: int | float) -> list[int]:
    """Return the places of candidates that are not too near, measured by the cosine of the positive."""
    highest = positive - (1 - max_ratio) * abs(positive)
    return [place for place, cosine in candidates if cosine <= highest]


def _chosen(places: list[int], mining: Mining, rng: random.Random) -> list[int]:
    """Take as many as are wanted, nearest first."""
    count = min(mining.negatives, len(places))
    return places[:count] if mining.nearest else [places[rank] for rank in sorted(rng.sample(range(len(places)), count))]


def _line(pair: Pair) -> str:
    """Return a pair as the row that `read_pairs` reads."""
    row = {
        "query": pair.query,
        "pos": pair.positives,
        "neg": pair.negatives,
        "prompt": pair.instruction or "",
        "type": "symmetric_sts" if pair.symmetric else "asymmetric",
    }
    return json.dumps(row, ensure_ascii=False)


def _hash(text: str) -> int:
    return text_hash(normalised(text))
