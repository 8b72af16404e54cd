"""From a batch of pairs to token ids, with the prompts that the recipe asks for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from genembed.errors import DataError, InputError
from genembed.settings import ModelSettings
from genembed.tokens import PromptTokenizer, TokenIds
from genembed.train.overlap import normalised, text_hash
from genembed.train.pairs import Pair
from genembed.train.recipe import Recipe


@dataclass(frozen=True)
class TrainingBatch:
    """What one process learns from at once."""

    number: int
    """Place of the batch in the run."""
    pairs: tuple[Pair, ...]
    steps: int
    """Refinement steps, K."""
    queries: list[TokenIds]
    candidates: list[TokenIds]
    """The positive of each query, in order, then hard negatives."""
    texts: list[str]
    """Queries and candidates without their instructions, in the order of `prompts`."""

    @property
    def prompts(self) -> list[TokenIds]:
        """All texts, queries first."""
        return [*self.queries, *self.candidates]

    @property
    def keys(self) -> Int[Tensor, "texts 2"]:
        """Two hashes of each text, in the order of `prompts`: of its letters and digits, and of the tokens that are read of it.

        Texts that share either are the same: copies may be set in another way, and long texts may differ beyond their limit alone.
        """
        texts = zip(self.texts, self.prompts, strict=True)
        hashes = [(text_hash(normalised(text)), text_hash(str(ids.tolist()))) for text, ids in texts]
        return torch.tensor([[key >> 1 for key in own] for own in hashes])  # PyTorch has no unsigned integers of eight bytes


class PairCollator:
    """Turns pairs into prompts: which texts carry an instruction, how much of them is read, and how many fit into a batch."""

    def __init__(self, recipe: Recipe, tokenizer: PromptTokenizer, settings: ModelSettings) -> None:
        self.recipe, self.tokenizer, self.settings = recipe, tokenizer, settings
        self.skipped: Counter[str] = Counter()
        """Pairs that could not be read at the limits of their batch, by source."""
        self.cut: Counter[str] = Counter()
        """Pairs for which `batch_tokens` left no room in their batch, by source; they come again with the next pass over their file."""
        self._by_length: dict[int, PromptTokenizer] = {}

    def __call__(self, number: int, pairs: Sequence[Pair], share: slice = slice(None)) -> TrainingBatch:
        """Prepare one batch.

        Everything random follows from the recipe's seed and the batch's number, so that a resumed run draws the same.

        Args:
            number: Place of the batch in the run.
            pairs: The pairs of all processes.
            share: Those of this process.
        """
        recipe, rng = self.recipe, random.Random(f"{self.recipe.seed} {number}")
        steps = drawn_steps(recipe, rng)
        instructed = rng.random() < recipe.instruction_share
        limit = rng.choice(recipe.length_limits) if recipe.length_limits else None
        query = self._limited(recipe.query_tokens, limit)
        passage = self._limited(recipe.passage_tokens, limit)
        processes = share.step or 1
        pairs, read = self._readable(pairs, query, passage, processes, instructed=instructed)
        # One batch of all is cut alike whatever their number; several batches side by side are kept of one size.
        unit = 1 if recipe.gather else processes
        count = max(processes, _fitting(read, recipe.batch_tokens) // unit * unit)
        self.cut.update(pair.source for pair in pairs[count:])
        chosen = [(pair, *ids) for pair, ids in zip(pairs, read, strict=True)][:count]
        return _batch(number, steps, chosen[share])

    def _readable(
        self, pairs: Sequence[Pair], query: PromptTokenizer, passage: PromptTokenizer, processes: int, *, instructed: bool
    ) -> tuple[list[Pair], list[Read]]:
        """Tokenise pairs, leaving out those whose instruction has no room for a text: a run must not end for one of them."""
        kept, read = [], []
        for pair in pairs:
            try:
                read.append(_read(pair, query, passage, instructed=instructed, rule=self.recipe.passage_rule))
                kept.append(pair)
            except InputError as error:
                self.skipped[pair.source] += 1
                reason = error
        if len(kept) < min(max(2, processes), len(pairs)):
            raise DataError(f"{pairs[0].source}: no batch can be made, as {len(pairs) - len(kept)} of its pairs cannot be read: {reason}")
        return kept, read

    def _limited(self, most: int, limit: int | None) -> PromptTokenizer:
        length = min(most, limit or most)
        if length not in self._by_length:
            self._by_length[length] = PromptTokenizer(self.tokenizer.tokenizer, replace(self.settings, max_length=length))
        return self._by_length[length]


Read = tuple[TokenIds, list[TokenIds]]
"""A pair as token ids: its query; its positive, then its negatives."""


def _read(pair: Pair, query: PromptTokenizer, passage: PromptTokenizer, *, instructed: bool, rule: str) -> Read:
    instruction = pair.instruction if instructed else None
    tokenizer = query if pair.symmetric else passage
    texts = [pair.positives[0], *pair.negatives]
    return query([pair.query], instruction).ids[0], tokenizer(texts, instruction if takes_instruction(pair, rule=rule) else None).ids


def drawn_steps(recipe: Recipe, rng: random.Random) -> int:
    """Draw K; in proportion to log((K + 1) / K), about 1 / K, where it is drawn log-uniformly."""
    least, most = recipe.min_steps, recipe.max_steps
    if recipe.draw_steps == "uniform":
        return rng.randint(least, most)
    return int(least * ((most + 1) / least) ** rng.random())


def _batch(number: int, steps: int, chosen: list[tuple[Pair, TokenIds, list[TokenIds]]]) -> TrainingBatch:
    """Lay a batch out: the positive of each query first, then the hard negatives."""
    read = [(ids, text) for pair, _, texts in chosen for ids, text in zip(texts[1:], pair.negatives, strict=True)]
    return TrainingBatch(
        number,
        tuple(pair for pair, _, _ in chosen),
        steps,
        queries=[query for _, query, _ in chosen],
        candidates=[*(texts[0] for _, _, texts in chosen), *(ids for ids, _ in read)],
        texts=[*(p.query for p, _, _ in chosen), *(p.positives[0] for p, _, _ in chosen), *(text for _, text in read)],
    )


def _fitting(read: Sequence[Read], batch_tokens: int) -> int:
    """Return how many of the pairs fit, counting every one as long as the longest text among them; at least one."""
    longest = 0
    for count, (query, texts) in enumerate(read):
        longest = max(longest, len(query), *(len(ids) for ids in texts))
        if batch_tokens and count and longest * (count + 1) > batch_tokens:
            return count
    return len(read)


def takes_instruction(pair: Pair, *, rule: str) -> bool:
    """Whether a pair's passages are read under the query's instruction.

    The released code decides by the words of the instruction: passages of retrieval tasks stay bare.
    """
    if rule == "symmetric":
        return pair.symmetric
    words = (pair.instruction or "").lower()
    return "retrieve" not in words or "semantic" in words


@runtime_checkable
class Batches(Protocol):
    """Batches of pairs of all processes, the same ones whenever they are iterated anew."""

    def __iter__(self) -> Generator[list[Pair]]:
        """Yield them from the first on."""


class BatchLoader:
    """The batches of one process, from a place in the run on: what a trainer iterates over."""

    def __init__(self, batches: Batches, collator: PairCollator, *, first: int, count: int, process: int, processes: int) -> None:
        self.batches, self.collator = batches, collator
        self.first, self.count, self.process, self.processes = first, count, process, processes
        self._reading: Generator[list[Pair]] | None = None

    def __len__(self) -> int:
        """Number of batches in the run, those done included, as trainers count."""
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield what is left of the run."""
        # Closed, or an endless stream would keep its files open.
        with closing(iter(self.batches)) as self._reading:
            for number, pairs in enumerate(islice(self._reading, self.count)):
                if number >= self.first:
                    yield {"batch": self.collator(number, pairs, slice(self.process, None, self.processes))}

    def close(self) -> None:
        """End the newest reading and close its files; a trainer that is done keeps its iterator, and the files with it."""
        if self._reading is not None:
            self._reading.close()
