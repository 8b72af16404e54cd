"""A causal language model that writes what may help an embedding of a text (GIRCSE 2025, appendix F)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genembed.backbone import Backbone
from genembed.checkpoint import Loaded
from genembed.errors import ConfigurationError, OutOfMemoryError
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch, TokenIds

PROMPT = (
    "Given the INSTRUCTION and the TEXT, produce a helpful augmentation that, when concatenated to the original TEXT and embedded, is "
    "likely to improve embedding quality for the instruction\u2019s task.\n\n"
    "Do not explain yourself or output anything other than the augmentation.\n\n"
    "Your answer must be written within {budget} tokens.\n\n"
    "INSTRUCTION: {instruction}\n\n"
    "TEXT: {text}"
)
"""GIRCSE's expansion prompt (table 7)."""

DEFAULT_TOKENS = 256
"""The paper's token budget of an augmentation (table 7)."""

_BATCH_TOKENS = 16_384
"""Positions of one batch, prompts and what is written after them."""


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """What the language model added to one text."""

    augmentation: str
    """Without special tokens and surrounding white space; empty if the model had nothing to add."""
    tokens: int
    """Tokens that were generated."""
    shortened: bool
    """Whether the language model saw the beginning of the text alone, because the whole did not fit into its window."""

    def after(self, text: str) -> str:
        """Return the text with the augmentation on a line of its own behind it."""
        return f"{text}\n{self.augmentation}" if self.augmentation else text


def expansion_prompt(text: str, instruction: str, budget: int) -> str:
    """Return the paper's prompt for a text, before any chat template.

    Args:
        text: The text to expand.
        instruction: What the embedding is for.
        budget: Tokens the model is told to stay within.
    """
    return PROMPT.format(budget=budget, instruction=instruction, text=text)


@torch.inference_mode()
def write_greedily(backbone: Backbone, prompts: Sequence[TokenIds], *, budget: int, stop: frozenset[int]) -> list[list[int]]:
    """Continue each prompt by its likeliest next token, again and again, until a stop token or the budget.

    No penalty and no sampling, whatever the model's generation_config.json suggests, so that the same text gets the same expansion.

    Args:
        backbone: A causal language model.
        prompts: Token ids, each of at least one token; padded on the left to one length.
        budget: Most tokens that are written for a prompt.
        stop: Ids that end a text; they are not part of it.

    Returns:
        The new tokens of each prompt, in order.
    """
    rows = CachedRows(backbone, TokenBatch.pad(prompts, device=backbone.device))
    written: list[list[int]] = [[] for _ in prompts]
    owners = list(range(len(prompts)))
    for step in range(budget):
        tokens = backbone.head(rows.last_hidden).argmax(-1)
        for owner, token in zip(owners, tokens.tolist(), strict=True):
            if token not in stop:
                written[owner].append(token)
        keep = [row for row, owner in enumerate(owners) if len(written[owner]) == step + 1]
        if not keep or step + 1 == budget:
            break
        if len(keep) < len(owners):
            index = torch.tensor(keep, device=tokens.device)
            rows.select(index)
            tokens, owners = tokens[index], [owners[row] for row in keep]
        rows.append(backbone.embed(tokens))
    return written


@dataclass(frozen=True, eq=False)
class _Prompt:
    ids: TokenIds
    shortened: bool


class Writer:
    """A causal language model that writes expansions."""

    def __init__(self, loaded: Loaded, budget: int) -> None:
        """Read off the model what it needs: its window, its stop tokens, its chat template.

        Args:
            loaded: The model.
            budget: Most tokens of an expansion.
        """
        self.name, self.backbone, self.budget = loaded.source.name, loaded.backbone, budget
        self.tokenizer: Any = loaded.tokenizer.tokenizer
        self.before = loaded.tokenizer.before
        self.stop = _stop_tokens(self.backbone, self.tokenizer)
        self.window = _window(self.backbone, self.tokenizer)

    def write(self, texts: Sequence[str], instruction: str) -> Iterator[dict[int, Expansion]]:
        """Expand texts, batch by batch, the longest first.

        Args:
            texts: Texts.
            instruction: What the embedding is for.

        Yields:
            The expansions of a batch by the position of their texts.

        Raises:
            ConfigurationError: If the window has no room for the prompt and the budget.
            OutOfMemoryError: If a single text does not fit into memory.
        """
        prompts = [self._prompt(text, instruction) for text in texts]
        for batch in _batches([len(prompt.ids) for prompt in prompts], self.budget):
            written = self._written([prompts[row].ids for row in batch])
            yield {row: self._expansion(ids, prompts[row]) for row, ids in zip(batch, written, strict=True)}

    def prompt_ids(self, text: str, instruction: str) -> list[int]:
        """Return the prompt of a text as token ids: one message of a user where the model has a chat template."""
        prompt = expansion_prompt(text, instruction, self.budget)
        if not self.tokenizer.chat_template:
            return [*self.before, *self._ids(prompt)]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,  # templates that know it: thoughts would take the budget, and are no augmentation
        )
        return self._ids(chat)  # the template has put the special tokens

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def _prompt(self, text: str, instruction: str) -> _Prompt:
        """Return the prompt with as much of the text, from its beginning, as leaves room for the budget."""
        ids = self.prompt_ids(text, instruction)
        room = len(ids) if self.window is None else self.window - self.budget
        if len(ids) <= room:
            return _Prompt(np.asarray(ids, dtype=np.int64), shortened=False)
        # The first number of characters that is too many.
        beyond = bisect_right(range(len(text)), room, key=lambda count: len(self.prompt_ids(text[:count], instruction)))
        if not beyond:
            raise ConfigurationError(
                f"--expand-with {self.name}: has {self.window} positions, which leaves no room for a text beside the prompt "
                f"({len(self.prompt_ids('', instruction))} tokens) and {self.budget} new tokens; give fewer, --expand-tokens, or another "
                "model."
            )
        return _Prompt(np.asarray(self.prompt_ids(text[: beyond - 1], instruction), dtype=np.int64), shortened=True)

    def _written(self, prompts: list[TokenIds]) -> list[list[int]]:
        """Continue prompts, in halves where memory runs out."""
        try:
            return write_greedily(self.backbone, prompts, budget=self.budget, stop=self.stop)
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise OutOfMemoryError(
                    f"--expand-with {self.name}: a prompt of {len(prompts[0])} tokens does not fit into memory even alone; use a smaller "
                    "model, or another --device."
                ) from error
        half = len(prompts) // 2  # outside the handler: the exception's frames hold the batch that did not fit
        return self._written(prompts[:half]) + self._written(prompts[half:])

    def _expansion(self, ids: list[int], prompt: _Prompt) -> Expansion:
        augmentation = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Expansion(augmentation=augmentation, tokens=len(ids), shortened=prompt.shortened)


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut positions into batches of similar length that have room for what is written."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, _BATCH_TOKENS // (lengths[order[start]] + budget))
        yield order[start : start + size]
        start += size


def _stop_tokens(backbone: Backbone, tokenizer: Any) -> frozenset[int]:
    """Return every id that ends a text: a chat model often has a second one, of a turn, in its generation_config.json."""
    named = getattr(backbone.model.generation_config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(int(number) for number in ids if number is not None)


def _window(backbone: Backbone, tokenizer: Any) -> int | None:
    """Return the positions the model was made for, by its configuration and its tokenizer; None if neither says."""
    known = [getattr(backbone.model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    # A tokenizer that does not know says a number with thirty zeros.
    return min((int(number) for number in known if number and number < 1 << 40), default=None)
