"""What training and testing must not share: the texts of test sets, and the pairs that are held out."""

from __future__ import annotations

import re
import unicodedata
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from genembed.train.pairs import FirstReading, Pair, folded

_PREFIX_LETTERS = 80
"""Longer texts that begin with the same so many letters and digits count as one: copies differ in how they end."""

_HASH_BYTES = 8
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


def normalised(text: str) -> str:
    """Return the letters and digits of a text in lower case, which copies of it share however they are set.

    Marks stay, for in many scripts they are vowels. A text without letters and digits keeps what it has, or all such texts would be one.
    """
    if text.isascii():
        kept = _NOT_ALPHANUMERIC.sub("", text.lower())
    else:
        lower = unicodedata.normalize("NFKC", text).casefold()
        kept = "".join(letter for letter in lower if unicodedata.category(letter)[0] in "LMN")
    return kept or folded(text)


def text_hash(text: str) -> int:
    """Return eight bytes of hash of a string, the same on every machine and in every run."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest(), "big")


def is_held_out(query: str, share: float) -> bool:
    """Whether the pairs of a query are kept from training, which is so in every file and every run, however the query is set.

    Args:
        query: The query of a pair.
        share: Share of the queries that are held out, 0..1; with a larger share the same ones stay held out and others join them.
    """
    return share > 0 and text_hash(f"held out {normalised(query)}") < share * (1 << 8 * _HASH_BYTES)


@dataclass(frozen=True, eq=False)
class TextFilter:
    """Keeps texts of test sets out of training; it holds eight bytes for each text and no text.

    Two texts are the same if their letters and digits are, or the first 80 of them, without regard to case.
    """

    hashes: Sequence[int] = field(repr=False)
    """Hashes of the texts, sorted."""
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    """What was kept out, counted once however often a file is read: `pairs` whose query is a test text or that lost their last
    positive, and `positives` and `negatives` taken out of pairs."""
    _first_reading: FirstReading = field(default_factory=FirstReading, init=False, repr=False)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> TextFilter:
        """Make a filter for the texts of test sets; blank ones are passed over."""
        return cls(array("Q", sorted({_prefix_hash(text) for text in texts if text.strip()})))

    @property
    def fingerprint(self) -> int:
        """A number that another set of texts would almost surely not have."""
        return int.from_bytes(blake2b(array("Q", self.hashes).tobytes(), digest_size=_HASH_BYTES).digest(), "big")

    def __contains__(self, text: str) -> bool:
        """Whether this is a test text."""
        wanted = _prefix_hash(text)
        place = bisect_left(self.hashes, wanted)
        return place < len(self.hashes) and self.hashes[place] == wanted

    def clean(self, pair: Pair, reading: str, line: int) -> Pair | None:
        """Return a pair without the test texts among its positives and negatives; None if there is nothing left to train on.

        Args:
            pair: A pair as it was read.
            reading: What is read, such as a file; what is found in it is counted once, however often it is read.
            line: Where the pair stands; lines of a reading come in order.
        """
        positives = tuple(text for text in pair.positives if text not in self)
        negatives = tuple(text for text in pair.negatives if text not in self)
        if not positives or pair.query in self:
            self._count(Counter(pairs=1), reading, line)
            return None
        found = Counter(positives=len(pair.positives) - len(positives), negatives=len(pair.negatives) - len(negatives))
        self._count(found, reading, line)
        return replace(pair, positives=positives, negatives=negatives)

    def _count(self, found: Counter[str], reading: str, line: int) -> None:
        if found.total() and self._first_reading(reading, line):
            self.dropped.update(+found)


def _prefix_hash(text: str) -> int:
    # A text of fewer letters is its own prefix, so one hash answers both questions.
    return text_hash(normalised(text)[:_PREFIX_LETTERS])
