"""Batches of training pairs: files mixed by weight and shuffled in bounded memory, and no text twice in a batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from genembed.errors import ConfigurationError, DataError
from genembed.train.overlap import TextFilter, is_held_out, normalised, text_hash
from genembed.train.pairs import BadRows, DataFile, Pair, is_scored, read_pairs

_FRUITLESS_PAIRS = 5_000
"""So many pairs in a row, beyond two full buffers, that share a text with the batch mean that it cannot be completed."""


class _Row(NamedTuple):
    """A pair as it was read, with the hashes of its texts."""

    pair: Pair
    hashes: frozenset[int]
    """Of the query and of all positives, also those that are not drawn: they are right answers to this query."""
    negative_hashes: tuple[int, ...]

    @classmethod
    def of(cls, pair: Pair) -> _Row:
        hashes = frozenset(text_hash(normalised(text)) for text in (pair.query, *pair.positives))
        return cls(pair, hashes, tuple(text_hash(normalised(text)) for text in pair.negatives))

    def draw(self, rng: random.Random, negatives: int, used: set[int]) -> Pair | None:
        """Draw one positive and some negatives, and add their hashes to those of the batch; None if one of them is there already."""
        if not used.isdisjoint(self.hashes):
            return None
        drawn = rng.sample(range(len(self.negative_hashes)), min(negatives, len(self.negative_hashes)))
        drawn_hashes = {self.negative_hashes[index] for index in drawn}
        if not used.isdisjoint(drawn_hashes):
            return None
        used |= self.hashes | drawn_hashes
        positive = rng.choice(self.pair.positives)
        return replace(self.pair, positives=(positive,), negatives=tuple(self.pair.negatives[index] for index in drawn))


class _Pool:
    """The rows of one file in random order, pass after pass, with a bounded number of them in memory."""

    def __init__(
        self, file: DataFile, rows: Callable[[float], Iterator[_Row]], *, size: int, epochs: int | float | None, rng: random.Random
    ) -> None:
        self.file = file
        self.passes = 0
        """Passes over the file that have begun."""
        self._open, self._size, self._epochs, self._rng = rows, size, epochs, rng
        self._rows: Iterator[_Row] = iter(())
        self._buffer: list[_Row] = []

    def pop(self) -> _Row | None:
        """Take a row out at random; None when all passes are done."""
        self._fill()
        if not self._buffer:
            return None
        place = self._rng.randrange(len(self._buffer))
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        return self._buffer.pop()

    def put_back(self, row: _Row) -> None:
        """Keep a row for a later batch."""
        self._buffer.append(row)

    def _fill(self) -> None:
        while len(self._buffer) < self._size:
            row = next(self._rows, None)
            if row is not None:
                self._buffer.append(row)
            # A new pass waits until the one before is used up: a short file would fill the buffer with copies of itself.
            elif self._buffer or not self._begin_pass():
                return

    def _begin_pass(self) -> bool:
        left = math.inf if self._epochs is None else self._epochs - self.passes
        if left <= 0:
            return False
        self.passes += 1
        self._rows = self._open(min(1.0, left))
        return True


class _Patience:
    """Notices that nothing the pools still give fits into a batch."""

    def __init__(self, pools: Sequence[_Pool], buffer: int) -> None:
        self._pools, self._limit = pools, 2 * buffer + _FRUITLESS_PAIRS
        self.restore()

    def restore(self) -> None:
        """Begin anew, because a pair has been found."""
        self._collisions = 0
        self._passes = [pool.passes for pool in self._pools]

    def collide(self) -> bool:
        """Count a pair that does not fit, and tell whether it is enough: too many of them, or a whole pass over every file."""
        self._collisions += 1
        whole_pass = all(pool.passes >= passes + 2 for pool, passes in zip(self._pools, self._passes, strict=True))
        return whole_pass or self._collisions > self._limit


@dataclass(frozen=True, eq=False)
class BatchStream:
    """Training batches, the same ones whenever it is iterated anew: a resumed run passes over those done with `itertools.islice`.

    Each batch has exactly `batch_size` pairs, each with one positive, drawn anew at every use. No text of a pair, not even a positive that
    was not drawn, is a text of another pair in the batch: letters and digits are compared, without regard to case. A pair that collides is
    put back for a later batch. Where as many as `shuffle_buffer` collide with one batch they are left out of this pass over their file
    and counted in `crowded_out`, so that a file where half the pairs have the same positive is used as far as it goes.

    A file that is through is read again, and its last pairs meet the first of the new pass. Files are looked at when the stream is made, so
    that a missing one shows at once, and read when batches are asked for.

    Raises:
        ConfigurationError: If a setting cannot work, a file is missing, or scored pairs would meet unscored ones in a batch.
        DataError: If a file has an unknown layout, no usable pair, or not enough pairs without a common text for one batch; in strict
            mode also at the first row that cannot be used.
    """

    files: Sequence[DataFile]
    _: KW_ONLY
    batch_size: int
    """Pairs in each batch."""
    one_source: bool = True
    """Take all pairs of a batch from one file, drawn by weight; otherwise draw the file of every single pair by weight."""
    seed: int = 0
    """Everything random follows from it."""
    shuffle_buffer: int = 10_000
    """Pairs of each file in memory, among which the next one is drawn."""
    negatives: int = 1
    """At most so many hard negatives are drawn for a pair."""
    epochs: int | float | None = None
    """How often every file is read; one that is through leaves the mix, its pairs that fill no batch are dropped, and the stream ends with
    the last one. Of a last part of a pass, as in 1.5, that share of the pairs is drawn. None: without end."""
    strict: bool = False
    """Raise at the first row that cannot be used; otherwise such rows are left out and counted in `bad`."""
    held_out: float = 0.0
    """Share of the pairs that is never trained on, 0..1; `held_out_pairs` reads them."""
    exclude: TextFilter | None = None
    """Texts that are never trained on."""
    bad: BadRows = field(default_factory=BadRows, repr=False)
    """Counts the rows and texts that are left out because they cannot be used."""
    crowded_out: Counter[str] = field(default_factory=Counter, repr=False)
    """Counts the pairs of each source that are left out of a pass, because they collide with too many others."""

    def __post_init__(self) -> None:
        """Check the values and look at the files."""
        for name, least in {"batch_size": 1, "shuffle_buffer": 1, "negatives": 0}.items():
            if not _is_int(getattr(self, name)) or getattr(self, name) < least:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: an integer of at least {least} is needed.")
        if not _is_int(self.seed):
            raise ConfigurationError(f"seed={self.seed!r}: an integer is needed.")
        if self.epochs is not None and not (_is_number(self.epochs) and 0 < self.epochs < math.inf):
            raise ConfigurationError(f"epochs={self.epochs!r}: a number above 0 is needed, or None for a stream without end.")
        if not _is_number(self.held_out) or not 0 <= self.held_out < 1:
            raise ConfigurationError(f"held_out={self.held_out!r}: a share of at least 0 and below 1 is needed.")
        self._check_files()

    def _check_files(self) -> None:
        if not self.files:
            raise ConfigurationError("files is empty: at least one file of training pairs is needed.")
        _check_names(self.files)
        scored = {file.source: is_scored(file) for file in self.files}
        if not self.one_source and len(set(scored.values())) > 1:
            with_scores, without = ([name for name, kind in scored.items() if kind is wanted] for wanted in (True, False))
            raise ConfigurationError(
                f"one_source=False would mix pairs with scores ({', '.join(with_scores)}) and without ({', '.join(without)}) in a batch; "
                "use one_source=True, or a stream for each kind."
            )

    def __iter__(self) -> Generator[list[Pair]]:
        """Yield the batches from the first on."""
        rng = random.Random(f"{self.seed}")
        pools = [self._pool(file, rng) for file in self.files]
        served: set[str] = set()
        while pools:
            group = rng.choices(pools, [pool.file.weight for pool in pools]) if self.one_source else pools
            batch = self._batch(group, rng)
            if len(batch) == self.batch_size:
                served.update(pair.source for pair in batch)
                yield batch
                continue
            if served.isdisjoint(pool.file.source for pool in group):
                raise self._too_few(group, len(batch))
            pools = [pool for pool in pools if pool not in group]

    def _pool(self, file: DataFile, rng: random.Random) -> _Pool:
        def rows(share: float) -> Iterator[_Row]:
            return (_Row.of(pair) for pair in self._training_pairs(file) if share == 1 or rng.random() < share)

        return _Pool(file, rows, size=self.shuffle_buffer, epochs=self.epochs, rng=rng)

    def _training_pairs(self, file: DataFile) -> Iterator[Pair]:
        usable = 0
        for line, read in read_pairs(file, self.bad, strict=self.strict):
            if is_held_out(read.query, self.held_out):
                continue
            pair = read if self.exclude is None else self.exclude.clean(read, f"{file.path}, training", line)
            if pair is not None:
                usable += 1
                yield pair
        if not usable:
            raise DataError(f"{file.path}: no pair to train on; leave the file out, or mend what was found so far:\n{self.bad.report()}")

    def _batch(self, pools: Sequence[_Pool], rng: random.Random) -> list[Pair]:
        """Make one batch; it is too short if the pools end before it is complete."""
        batch: list[Pair] = []
        used: set[int] = set()
        aside: list[tuple[_Pool, _Row]] = []
        patience = _Patience(pools, self.shuffle_buffer)
        for pool, row in _mixed(pools, rng):
            pair = row.draw(rng, self.negatives, used)
            if pair is not None:
                batch.append(pair)
                patience.restore()
            else:
                aside.append((pool, row))
                if patience.collide():
                    raise self._too_few(pools, len(batch))
            if len(batch) == self.batch_size:
                break
            if len(aside) == self.shuffle_buffer:
                self.crowded_out.update(pool.file.source for pool, _ in aside)
                aside.clear()
        for pool, row in aside:
            pool.put_back(row)
        return batch

    def _too_few(self, pools: Sequence[_Pool], fitting: int) -> DataError:
        names = ", ".join(pool.file.source for pool in pools)
        return DataError(
            f"{names}: no batch of {self.batch_size} pairs that share no text can be made, only one of {fitting}; "
            f"use a smaller batch_size, or leave out what is too short or has the same texts over and over."
        )


def held_out_pairs(
    files: Sequence[DataFile], *, share: float, limit: int | None = None, exclude: TextFilter | None = None
) -> dict[str, list[Pair]]:
    """Read the pairs that a `BatchStream` with `held_out=share` never gives: by source, whole, and in the order of their file.

    Args:
        files: Where to read; rows that cannot be used are passed over, for the stream counts them.
        share: Share of the pairs that is held out, between 0 and 1.
        limit: At most so many of each file, the first ones; of a sorted file, a smaller share gives a fairer sample.
        exclude: Texts that are left out here too.

    Raises:
        ConfigurationError: If share or limit cannot work, a file is missing, or two have the same name.
        DataError: If a file has an unknown layout.
    """
    if not _is_number(share) or not 0 < share < 1:
        raise ConfigurationError(f"share={share!r}: a share between 0 and 1 is needed.")
    if limit is not None and (not _is_int(limit) or limit < 1):
        raise ConfigurationError(f"limit={limit!r}: an integer of at least 1 is needed, or None for all.")
    _check_names(files)

    def held_out(file: DataFile) -> Iterator[Pair]:
        for line, read in read_pairs(file, BadRows()):
            if is_held_out(read.query, share):
                pair = read if exclude is None else exclude.clean(read, f"{file.path}, held out", line)
                if pair is not None:
                    yield pair

    return {file.source: list(islice(held_out(file), limit)) for file in files}


def _check_names(files: Sequence[DataFile]) -> None:
    repeated = [name for name, count in Counter(file.source for file in files).items() if count > 1]
    if repeated:
        raise ConfigurationError(f"several files are called {repeated[0]!r}; give each a name of its own with DataFile(name=...).")


def _mixed(pools: Sequence[_Pool], rng: random.Random) -> Iterator[tuple[_Pool, _Row]]:
    """Take rows out of the pools, each time out of one drawn by weight, until all are empty."""
    left = list(pools)
    while left:
        pool = rng.choices(left, [pool.file.weight for pool in left])[0]
        row = pool.pop()
        if row is None:
            left.remove(pool)
        else:
            yield pool, row


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_int(value)
