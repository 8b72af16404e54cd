"""From prompted text to token ids, and from many texts to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from genembed.errors import CheckpointError, ConfigurationError, InputError
from genembed.prompt import PromptTemplate
from genembed.settings import ModelSettings

TokenIds = np.ndarray[Any, np.dtype[np.int64]]
"""Token ids of one prompt, `Int[prompt]`."""

_PROBE = "a"
_SLICE = 256


@dataclass(frozen=True)
class Tokenised:
    """The prompts of a call as token ids."""

    ids: list[TokenIds]
    """One array for each text, special tokens included."""
    tokens: Int[np.ndarray, "texts"]
    """Tokens read for each text."""
    truncated: Bool[np.ndarray, "texts"]
    """Whether the text was longer than the model's limit and lost its end."""
    longest: int
    """Tokens of the longest prompt before anything was cut."""
    shared: int
    """Leading tokens that come from the template and the instruction; a text that begins unusually may change the last of them."""


@dataclass(frozen=True)
class TokenBatch:
    """Padded prompts, as the reference loop reads them."""

    input_ids: Int[Tensor, "rows prompt"]
    mask: Bool[Tensor, "rows prompt"]
    index: Int[Tensor, "rows"]

    @classmethod
    def pad(cls, prompts: Sequence[TokenIds], *, index: Sequence[int] | None = None, side: str = "left", device: Any = "cpu") -> TokenBatch:
        """Pad prompts to one length. The id under the padding is 0; the mask hides it and no position counts it."""
        lengths = [len(ids) for ids in prompts]
        width = max(lengths)
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            span = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
            input_ids[row, span] = torch.from_numpy(ids)
            mask[row, span] = True
        numbers = torch.arange(len(prompts)) if index is None else torch.as_tensor(list(index))
        return cls(input_ids.to(device), mask.to(device), numbers.to(device))

    @property
    def positions(self) -> Int[Tensor, "rows prompt"]:
        """Position of each token in its own text, from 0; padding has position 0 and is hidden by the mask."""
        return (self.mask.long().cumsum(-1) - 1).clamp_min(0)


class PromptTokenizer:
    """Turns texts into token ids exactly as the model's settings say.

    Tokenizer post-processors are not trusted: since Transformers 5 they may drop an EOS that the configuration asks for
    (embeddings-benchmark/mteb#5237). Special tokens come from our settings, or are read off the tokenizer once, at load.
    """

    def __init__(self, tokenizer: Any, settings: ModelSettings) -> None:
        self.tokenizer = tokenizer
        self.template = PromptTemplate(settings.template)
        self.max_length = settings.max_length
        self.before, self.after = self._special_ids(settings)
        if len(self.before) + len(self.after) >= self.max_length:
            raise ConfigurationError(
                f"max_length={self.max_length} leaves no room for a text beside {len(self.before) + len(self.after)} special tokens."
            )

    def __call__(self, texts: Sequence[str], instruction: str | None = None, *, first_row: int = 0) -> Tokenised:
        """Tokenise texts under one instruction.

        Args:
            texts: Texts.
            instruction: What the embedding is for; without one the texts are read bare.
            first_row: Number of the first text in the caller's list, for error messages.

        Raises:
            TypeError: If a text is not a string; the message has its row.
            InputError: If a text cannot be encoded as UTF-8 or has no token at all; the message has its row.
        """
        check_texts(texts, first_row=first_row)
        _check_instruction(instruction)
        head, tail = self.template.around(instruction)
        tail_ids = [*(self._encode([tail])[0] if tail else []), *self.after]
        room = self.max_length - len(self.before) - len(tail_ids)
        if room < 1 or (head and len(self._encode([head])[0]) >= room):
            raise InputError(f"the instruction leaves no room for a text: max_length is {self.max_length} tokens; shorten the instruction.")
        ids, truncated, longest = [], np.zeros(len(texts), dtype=np.bool_), 0
        for row, body in enumerate(self._bodies(head, texts)):
            truncated[row] = len(body) > room
            longest = max(longest, len(body) + self.max_length - room)
            ids.append(np.asarray([*self.before, *body[:room], *tail_ids], dtype=np.int64))
            if not ids[-1].size:
                raise InputError(
                    f"row {first_row + row}: the text {texts[row]!r:.80} has no tokens, nothing to embed; drop it or use an instruction.",
                    row=first_row + row,
                )
        shared = len(self.before) + self._fixed(head)
        return Tokenised(ids, np.asarray([len(row_ids) for row_ids in ids], dtype=np.int64), truncated, longest, shared)

    def _fixed(self, head: str) -> int:
        """Return how many of the tokens before a text are the same whatever text follows, as far as two texts can tell."""
        one, other = self._encode([f"{head}a", f"{head}1"]) if head else ([], [])
        return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

    def _bodies(self, head: str, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield each text's ids, a slice of the texts at a time: uncut long texts do not pile up in memory."""
        for start in range(0, len(texts), _SLICE):
            yield from self._encode([head + text for text in texts[start : start + _SLICE]])

    def prompt(self, text: str, instruction: str | None = None) -> str:
        """Return the exact string that is tokenised, with the special tokens that are put around it."""
        names = self.tokenizer.convert_ids_to_tokens
        return "".join([*names(self.before), self.template.apply(text, instruction), *names(self.after)])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        with naming_panics("the tokenizer"):
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def _special_ids(self, settings: ModelSettings) -> tuple[list[int], list[int]]:
        if settings.special_tokens == "tokenizer":
            return self._read_off()
        if settings.special_tokens == "eos":
            return [], [self._id(str(self.tokenizer.eos_token))]
        before, after = settings.special_tokens
        return [self._id(token) for token in before], [self._id(token) for token in after]

    def _read_off(self) -> tuple[list[int], list[int]]:
        bare = self._encode([_PROBE])[0]
        full = self.tokenizer([_PROBE], add_special_tokens=True)["input_ids"][0]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise CheckpointError("the tokenizer changes a text when it adds special tokens; name them in the settings: special_tokens.")

    def _id(self, token: str) -> int:
        number = self.tokenizer.convert_tokens_to_ids(token)
        if number is None or (token != self.tokenizer.unk_token and number == self.tokenizer.unk_token_id):
            raise CheckpointError(
                f"special token {token!r} is not in this tokenizer's vocabulary; settings and tokenizer do not belong together."
            )
        return int(number)


@contextmanager
def naming_panics(name: str) -> Iterator[None]:
    """Turn a panic of the tokenizers library into our error: a damaged file can cause one, and `except Exception` lets it through.

    Raises:
        CheckpointError: If there is one.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the class cannot be imported
            raise
        raise CheckpointError(f"{name} breaks down: {error}; its files are damaged, take them from their source again.") from error


def check_texts(texts: Sequence[str], *, first_row: int = 0) -> None:
    """Refuse what is not text, naming the row."""
    for row, text in enumerate(texts, start=first_row):
        if not isinstance(text, str):
            raise TypeError(f"row {row}: expected a string, got {type(text).__name__}: {text!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"row {row}: character {error.start} is a lone surrogate ({text[error.start]!r}), which is not valid Unicode; decode the "
                "source again, or replace it: text.encode('utf-8', 'replace').decode()",
                row=row,
            ) from None


def _check_instruction(instruction: str | None) -> None:
    """Refuse an instruction that is not text."""
    if instruction is not None and not isinstance(instruction, str):
        raise TypeError(f"instruction: expected a string, got {type(instruction).__name__}: {instruction!r:.80}")
    try:
        (instruction or "").encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the instruction is not valid Unicode (a lone surrogate at character {error.start}); decode its source again."
        ) from None


def common_prefix(prompts: Sequence[TokenIds]) -> int:
    """Return the number of leading tokens that all prompts share, leaving every prompt at least one token of its own."""
    first = min(prompts, key=len)
    shared = len(first) - 1
    for ids in prompts:
        if shared <= 0:
            return 0
        different = np.flatnonzero(ids[:shared] != first[:shared])
        shared = int(different[0]) if different.size else shared
    return shared
