"""Sequences being refined together, as the reference loop keeps them: padded, with Transformers' own cache or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from genembed.errors import ConfigurationError
from genembed.tokens import TokenBatch

if TYPE_CHECKING:
    from genembed.backbone import Backbone


@runtime_checkable
class Rows(Protocol):
    """What one refinement step needs of the sequences it works on."""

    last_hidden: Float[Tensor, "rows hidden"]
    """Hidden state of the newest position of each row."""

    def generate(self) -> None:
        """Go on by one soft token in every row."""


class GrowingRows(ABC):
    """Sequences that are refined together, to which soft tokens are added one by one."""

    backbone: Backbone
    last_hidden: Float[Tensor, "rows hidden"]
    """Hidden state of the newest position of each row."""

    def generate(self) -> None:
        """Add one soft token to every row and read it."""
        self.append(self.backbone.next_embeddings(self.last_hidden))

    @abstractmethod
    def append(self, embeddings: Float[Tensor, "rows hidden"]) -> None:
        """Add one position to every row and read it."""


class CachedRows(GrowingRows):
    """Padded rows over a `DynamicCache`: the slow obvious version, differentiable.

    Positions are explicit and count no padding, so a row's numbers do not depend on its neighbours.
    """

    def __init__(self, backbone: Backbone, batch: TokenBatch) -> None:
        _check_padding(backbone, batch)
        self.backbone = backbone
        self.mask = batch.mask
        self.next_position = batch.mask.sum(-1)
        self.cache = backbone.new_cache()
        states = backbone.forward(
            backbone.embed(batch.input_ids),
            positions=batch.positions,
            mask=prompt_mask(batch.mask, backbone),
            cache=self.cache,
            generated=False,
        )
        self.last_hidden, self.mean_hidden = summarise(states, batch.mask)

    def append(self, embeddings: Float[Tensor, "rows hidden"]) -> None:
        """Add one position to every row and read it through the cache."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        mask = self.mask if self.backbone.causal else additive(self.mask[:, None, None, :], embeddings.dtype)
        states = self.backbone.forward(
            embeddings[:, None], positions=self.next_position[:, None], mask=mask, cache=self.cache, generated=True
        )
        self.next_position = self.next_position + 1
        self.last_hidden = states[:, -1]

    def select(self, keep: Int[Tensor, "kept"]) -> None:
        """Keep only the rows `keep`, in that order."""
        self.cache.batch_select_indices(keep)
        self.mask, self.next_position, self.last_hidden = self.mask[keep], self.next_position[keep], self.last_hidden[keep]


class RecomputedRows(GrowingRows):
    """Padded rows without a cache: every step reads the whole sequence again, as the released training code does."""

    def __init__(self, backbone: Backbone, batch: TokenBatch) -> None:
        if backbone.adapter_on_generated_only:
            raise ConfigurationError("adapter_positions='generated' needs the cache: one pass cannot read with two sets of weights.")
        _check_padding(backbone, batch)
        self.backbone = backbone
        self.batch = batch
        self.embeddings = backbone.embed(batch.input_ids)
        self.generated = 0
        self.last_hidden, self.mean_hidden = summarise(self._read(), batch.mask)

    def append(self, embeddings: Float[Tensor, "rows hidden"]) -> None:
        """Add one position to every row."""
        self.embeddings = torch.cat([self.embeddings, embeddings[:, None]], dim=1)
        self.generated += 1
        self.last_hidden = self._read()[:, -1]

    def _read(self) -> Float[Tensor, "rows length hidden"]:
        prompt, ones = self.batch.mask, self.batch.mask.new_ones(len(self.batch.mask), self.generated)
        mask = torch.cat([prompt, ones], dim=1)
        new = prompt.sum(-1, keepdim=True) + torch.arange(self.generated, device=prompt.device)
        positions = torch.cat([self.batch.positions, new], dim=1)
        visible = mask if self.backbone.causal else self._prefix_mask(mask)
        return self.backbone.forward(self.embeddings, positions=positions, mask=visible, cache=None, generated=False)

    def _prefix_mask(self, mask: Bool[Tensor, "rows length"]) -> Float[Tensor, "rows 1 length length"]:
        length, prompt = mask.shape[1], self.batch.mask.shape[1]
        place = torch.arange(length, device=mask.device)
        sees = (place[None, :] <= place[:, None]) | (place[None, :] < prompt)
        return additive(sees[None, None] & mask[:, None, None, :], self.embeddings.dtype)


def _check_padding(backbone: Backbone, batch: TokenBatch) -> None:
    """Refuse padding between a prompt and what is generated where it would count: a sliding window measures cache places."""
    if backbone.has_sliding_window and not bool(batch.mask[:, -1].all()):
        raise ConfigurationError(
            f"padding_side='right' with {type(backbone.model).__name__}: its sliding window would count the padding; pad on the left."
        )


def prompt_mask(mask: Bool[Tensor, "rows prompt"], backbone: Backbone) -> Tensor:
    """Return the mask of the prompt pass: 2-D where Transformers adds causality itself, 4-D where every token sees every other."""
    return mask if backbone.causal else additive(mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1), backbone.dtype)


def additive(visible: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Turn a boolean mask into one that is added to attention scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def summarise(
    states: Float[Tensor, "rows prompt hidden"], mask: Bool[Tensor, "rows prompt"]
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows hidden"]]:
    """Return the last state and the mean state of each prompt, whichever side the padding is on."""
    last = mask.shape[1] - 1 - mask.flip(-1).long().argmax(-1)
    weights = mask.to(states.dtype)[..., None]
    return states[torch.arange(len(states), device=states.device), last], (states * weights).sum(1) / weights.sum(1)
