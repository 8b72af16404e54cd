"""What a model says to itself: the likeliest tokens of each soft token (GIRCSE, table 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.embedder import Embedder
from genembed.errors import ConfigurationError
from genembed.halting import FixedSteps
from genembed.refine import step
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch

PHASES = ((1, 5), (6, 10), (11, 20))
"""First and last steps of the phases whose new tokens the paper shows."""


class Spoken(NamedTuple):
    """A token and its share of a soft token."""

    token: str
    probability: float


@torch.inference_mode()
def spoken_tokens(model: Embedder, text: str, *, instruction: str | None = None, steps: int, top: int = 5) -> list[list[Spoken]]:
    """Return the likeliest tokens of the soft token of each step, likeliest first, with their shares under the model's temperature.

    Args:
        model: A model that refines.
        text: One text.
        instruction: Put before it by the model's template.
        steps: Soft tokens, at least 1.
        top: Tokens of each.

    Raises:
        ConfigurationError: If the model generates nothing, or a number is below 1.
        InputError: If the text cannot be embedded.
    """
    if steps < 1 or top < 1:
        raise ConfigurationError(f"steps={steps}, top={top}: both must be at least 1.")
    backbone = model.backbone
    backbone.check_halt(FixedSteps(steps))
    batch = TokenBatch.pad(model.tokenizer([text], instruction).ids, side=backbone.settings.padding_side, device=backbone.device)
    rows = CachedRows(backbone, batch)
    progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
    said = []
    for _ in range(steps):
        said.append(likeliest(model, rows.last_hidden, top=top))
        progress, _cosine = step(backbone, rows, progress)
    return said


def likeliest(model: Embedder, last_hidden: Float[Tensor, "one hidden"], *, top: int) -> list[Spoken]:
    """Return the `top` likeliest tokens of the soft token that follows one text's last hidden state, likeliest first."""
    backbone = model.backbone
    shares = torch.softmax(backbone.head(last_hidden)[0].float() / backbone.settings.temperature, dim=-1)
    best = shares.topk(min(top, len(shares)))
    names = model.tokenizer.tokenizer.convert_ids_to_tokens(_ids(model, best.indices))
    return [Spoken(name, share) for name, share in zip(map(_readable, names), best.values.tolist(), strict=True)]


def new_tokens(said: Sequence[Sequence[Spoken]]) -> list[tuple[int, int, list[str]]]:
    """Return for each phase its first and last step and the tokens that were not said before it, in the order in which they are said."""
    known: set[str] = set()
    phases = []
    for first, last in PHASES:
        if first > len(said):
            break
        fresh = list(dict.fromkeys(word.token for best in said[first - 1 : last] for word in best if word.token not in known))
        known.update(fresh)
        phases.append((first, min(last, len(said)), fresh))
    return phases


def _ids(model: Embedder, places: Tensor) -> list[int]:
    """Turn places among the tokens that a head can speak into token ids."""
    head = model.backbone.trained_head
    ids: list[int] = (places if head is None or head.tokens is None else head.tokens[places]).tolist()
    return ids


def _readable(token: str) -> str:
    """Show the space of byte-level and SentencePiece tokens as one."""
    return token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\\n")
