"""Sequences being refined together, as the engine keeps them: no padding, one pool of keys and values.

Prompts are read as one row [1, tokens] with explicit positions; one refinement step is one row [1, rows]. Linear layers
never see padding, attention works inside each text, and a row that leaves costs one copy of its successor's cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from genembed import native
from genembed.attention import attend, wide_softmax
from genembed.rows import GrowingRows
from genembed.tokens import TokenIds

if TYPE_CHECKING:
    from genembed.backbone import Backbone


@dataclass(frozen=True)
class SharedPrefix:
    """Leading tokens that every prompt of a run shares, read once: their keys and values by layer."""

    length: int
    keys: list[Float[Tensor, "kv_heads prefix head_dim"]]
    values: list[Float[Tensor, "kv_heads prefix head_dim"]]
    state_sum: Float[Tensor, "hidden"]


@dataclass(frozen=True)
class _Group:
    """Neighbouring prompts of one length, attended to in one call."""

    row: int
    token: int
    count: int
    length: int


class PackedRows(GrowingRows):
    """Rows of one decode batch over a pool of `max_rows` slots.

    Slot i belongs to row i; each holds the keys and values of its own tokens, after the shared prefix if there is one.
    Inference only: the pool is written in place.

    Args:
        backbone: The model.
        max_rows: Slots.
        max_tokens: Own tokens a slot can hold, prompt and generated; 0 when nothing will be generated.
        prefix: Keys and values that every row sees first.
        replay: Adds a soft token to every row in another way, if it can, and tells whether it did.
        attention: Attends in another way in a step.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_rows: int,
        max_tokens: int,
        prefix: SharedPrefix | None = None,
        replay: Callable[[PackedRows], bool] | None = None,
        attention: native.Attention | None = None,
    ) -> None:
        self.backbone = backbone
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.prefix = prefix
        self.replay = replay
        self.attention = attention
        self.prefix_length = prefix.length if prefix else 0
        self.lengths: Int[Tensor, "rows"] = torch.zeros(0, dtype=torch.long, device=backbone.device)
        self.last_hidden = self.mean_hidden = torch.zeros(0, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
        self._keys: dict[int, Float[Tensor, "slots kv_heads tokens head_dim"]] = {}
        self._values: dict[int, Float[Tensor, "slots kv_heads tokens head_dim"]] = {}
        self._groups: list[_Group] | None = None
        self._used = self._written = 0
        self._ahead = 0
        self._fixed = False
        self._mask: Tensor | None = None
        self._pools: Any = None

    def __len__(self) -> int:
        """Rows in the batch now."""
        return self.lengths.shape[0]

    @property
    def full(self) -> bool:
        """Whether the longest row has no place for one more position."""
        return self._used >= self.max_tokens

    @property
    def described(self) -> native.Rows:
        """The rows, their pool and the shared prefix as steps in C read them; good until rows or lengths change."""
        if self._pools is None:
            prefix = self.prefix
            shared = [(None, None)] * len(self._keys) if prefix is None else [*zip(prefix.keys, prefix.values, strict=True)]
            tensors = [(self._keys[layer], self._values[layer], *shared[layer]) for layer in sorted(self._keys)]
            self._pools = native.pools(tensors)
        return native.Rows(len(self), self.prefix_length, self.max_tokens, self.lengths.data_ptr(), self._pools)

    def admit(self, prompts: Sequence[TokenIds]) -> None:
        """Read prompts (longest first, so that equal lengths are neighbours) and add them behind the present rows.

        Afterwards `last_hidden` covers all rows, and `mean_hidden` the mean prompt state of the new ones.
        """
        own = [ids[self.prefix_length :] for ids in prompts]
        lengths = [len(ids) for ids in own]
        self._groups = _groups(lengths, first_row=len(self))
        tokens = torch.from_numpy(np.concatenate(own)).to(self.backbone.device)
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(self.backbone.device) + self.prefix_length
        states = self.backbone.forward_packed(self.backbone.embed(tokens), positions, rows=self, generated=False)
        self.lengths = torch.cat([self.lengths, torch.tensor(lengths, device=self.backbone.device)])
        self._used = int(self.lengths.max())
        ends = torch.tensor(lengths, device=states.device).cumsum(0) - 1
        self.last_hidden = torch.cat([self.last_hidden, states[ends]])
        self.mean_hidden = self._mean_states(states)
        self._groups = None

    def generate(self) -> None:
        """Add one soft token to every row and read it."""
        if self.replay is None or not self.replay(self):
            self.append(self.backbone.next_embeddings(self.last_hidden))

    def append(self, embeddings: Float[Tensor, "rows hidden"]) -> None:
        """Add one position to every row and read it."""
        self._used += 1
        self.last_hidden = self.read_next(embeddings)
        self.lengths = self.lengths + 1

    def read_next(self, embeddings: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        """Read one more position of every row and keep its keys and values, without counting it."""
        # Where the pool is full, PyTorch's operations refuse what C would write behind it.
        self._mask = self._visible() if self.attention is None or self._used > self.max_tokens else None
        return self.backbone.forward_packed(embeddings, self.lengths + self.prefix_length, rows=self, generated=True)

    def _visible(self) -> Bool[Tensor, "rows 1 1 keys"] | None:
        """Tell which positions each row sees; None where rows do not differ: compared on the host once a step, not once a layer."""
        visible = torch.arange(self._used, device=self.lengths.device) <= self.lengths[:, None]
        hides = self._fixed or not bool(visible[:, -1].all())
        return visible[:, None, None, :] if hides else None

    def accept(self, states: Float[Tensor, "rows hidden"]) -> None:
        """Count a position of every row that was read by `replay`."""
        self._used += 1
        self.last_hidden = states
        self.lengths = self.lengths + 1

    def hold(self, finished: Bool[Tensor, "rows"]) -> None:
        """Take the newest position of rows back that are finished and still here, so that they write in the same place again."""
        self.lengths = self.lengths - finished.long()

    def clear(self) -> None:
        """Let all rows go; the slots stay."""
        self.select(self.lengths.new_zeros(0))

    def fix(self, lengths: Int[Tensor, "slots"]) -> None:
        """Read on from `lengths`, over all positions of as many slots, without a look at any value."""
        self.lengths, self._used, self._fixed = lengths, self.max_tokens, True

    def read_ahead(self, embeddings: Float[Tensor, "rows steps hidden"]) -> Float[Tensor, "rows steps hidden"]:
        """Read several positions after every row without adding them: each sees its row, and those of them that are before it."""
        self._ahead = embeddings.shape[1]
        positions = self.lengths[:, None] + self.prefix_length + torch.arange(self._ahead, device=self.lengths.device)
        try:
            states = self.backbone.forward_packed(embeddings.flatten(0, 1), positions.flatten(), rows=self, generated=True)
        finally:
            self._ahead = 0
        return states.reshape(embeddings.shape)

    def select(self, keep: Int[Tensor, "kept"]) -> None:
        """Keep only the rows `keep`, in that order. A row that keeps its place costs nothing."""
        place = torch.arange(len(keep), device=keep.device)
        moved = (keep != place).nonzero()[:, 0]
        self.lengths, self.last_hidden = self.lengths[keep], self.last_hidden[keep]
        if len(moved):
            source = keep[moved]
            for pool in (*self._keys.values(), *self._values.values()):
                pool[moved, :, : self._used] = pool[source, :, : self._used]
        self._written = max(self._written, self._used)
        self._used = int(self.lengths.max()) if len(keep) else 0

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "heads tokens head_dim"],
        key: Float[Tensor, "kv_heads tokens head_dim"],
        value: Float[Tensor, "kv_heads tokens head_dim"],
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Attend within each text; called by every layer of the backbone."""
        if not self.backbone.causal:
            sliding_window = None  # a prompt that sees all of itself has no window, and neither has the reference loop
        if self._groups is not None:
            return self._attend_prompts(layer, query, key, value, scale, sliding_window, softcap)
        if self._ahead:
            return self._attend_ahead(layer, query, key, value, scale, sliding_window, softcap)
        return self._attend_step(layer, query, key, value, scale, sliding_window, softcap)

    def share(self, prefix: TokenIds) -> SharedPrefix:
        """Read the tokens that all prompts begin with, once, for a batch that will share them."""
        self.admit([prefix])
        keys = [self._keys[layer][0, :, : len(prefix)].clone() for layer in sorted(self._keys)]
        values = [self._values[layer][0, :, : len(prefix)].clone() for layer in sorted(self._values)]
        return SharedPrefix(len(prefix), keys, values, self.mean_hidden[0] * len(prefix))

    def _attend_prompts(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        heads, tokens, _ = query.shape
        result = query.new_empty(tokens, heads, value.shape[-1])
        assert self._groups is not None
        for group in self._groups:
            span = slice(group.token, group.token + group.count * group.length)
            q, k, v = (part[:, span].unflatten(1, (group.count, group.length)).transpose(0, 1) for part in (query, key, value))
            self._store(layer, group, k, v)
            out = self._attend_group(layer, q, k, v, scale, window, softcap)
            result[span] = out.transpose(1, 2).flatten(0, 1)
        return result

    def _attend_group(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
        length, causal = q.shape[2], self.backbone.causal
        if self.prefix is not None:
            k = torch.cat([self.prefix.keys[layer].expand(len(k), -1, -1, -1), k], dim=2)
            v = torch.cat([self.prefix.values[layer].expand(len(v), -1, -1, -1), v], dim=2)
        sliding = window if window is not None and k.shape[2] > window else None
        if causal and self.prefix is None and sliding is None and softcap is None:
            groups = q.shape[1] // k.shape[1]
            k, v = (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        mask = None
        if causal:
            place = torch.arange(k.shape[2], device=q.device)
            mask = place <= place[-length:, None]
            if sliding is not None:
                mask &= place > place[-length:, None] - sliding
        return attend(q, k, v, mask, scale, softcap)

    def _store(self, layer: int, group: _Group, key: Tensor, value: Tensor) -> None:
        if not self.max_tokens:
            return
        if layer not in self._keys:
            if not native.attends(key.shape[-1], value.shape[-1]):
                self.attention = None
            self._keys[layer] = key.new_empty(self.max_rows, key.shape[1], self.max_tokens, key.shape[3])
            # Zeros, not whatever memory holds: a masked score is overwritten, but its weight 0 times NaN would be NaN.
            self._values[layer] = value.new_zeros(self.max_rows, value.shape[1], self.max_tokens, value.shape[3])
        slots = slice(group.row, group.row + group.count)
        self._keys[layer][slots, :, : group.length] = key
        self._values[layer][slots, :, : group.length] = value
        # Zeros again behind the prompt: a text whose states were not finite would spoil the one that takes its place.
        self._values[layer][slots, :, group.length : max(self._written, self._used)] = 0

    def _attend_ahead(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        rows, steps = len(self), self._ahead
        q, k, v = (part.unflatten(1, (rows, steps)).transpose(0, 1) for part in (query, key, value))
        keys, values = [self._keys[layer][:rows, :, : self._used], k], [self._values[layer][:rows, :, : self._used], v]
        if self.prefix is not None:
            keys.insert(0, self.prefix.keys[layer].expand(rows, -1, -1, -1))
            values.insert(0, self.prefix.values[layer].expand(rows, -1, -1, -1))
        # Plain products: what a short row's slot holds behind it may be NaN, which a fused mask that is added would not hide.
        out = attend(q, torch.cat(keys, dim=2), torch.cat(values, dim=2), self._ahead_mask(window), scale, softcap, fused=False)
        return out.transpose(1, 2).flatten(0, 1)

    def _ahead_mask(self, window: int | None) -> Bool[Tensor, "rows 1 steps keys"]:
        """Tell which keys each position read ahead sees: the shared prefix, its row's own, and those read with it up to itself."""
        ends = self.lengths[:, None]
        prefix, own, new = (torch.arange(n, device=ends.device) for n in (self.prefix_length, self._used, self._ahead))
        places = torch.cat([(prefix - self.prefix_length).expand(len(ends), -1), own.expand(len(ends), -1), ends + new], dim=1)
        written = torch.cat([prefix.new_ones(len(ends), len(prefix)), own < ends, new.new_ones(len(ends), len(new))], dim=1).bool()
        at = (ends + new)[:, :, None]
        visible = written[:, None] & (places[:, None] <= at)
        if window is not None:
            visible &= places[:, None] > at - window
        return visible[:, None]

    def _attend_step(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if self.attention is not None and self._used <= self.max_tokens:
            return self.attention(self.described, layer, query, key, value, scale, window, softcap)
        rows, kv_heads = len(self), key.shape[0]
        slots = torch.arange(rows, device=query.device)
        self._keys[layer][slots, :, self.lengths] = key.transpose(0, 1)
        self._values[layer][slots, :, self.lengths] = value.transpose(0, 1)
        keys, values = self._keys[layer][:rows, :, : self._used], self._values[layer][:rows, :, : self._used]
        # Query heads that share a key head become the length dimension, so that no key is copied for its group. The scale comes
        # before the products, which could overflow half precision.
        q = query.transpose(0, 1).unflatten(1, (kv_heads, -1)) * scale
        return self._attend_cascade(layer, q, keys, values, window, softcap).flatten(1, 2)

    def _attend_cascade(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None) -> Tensor:
        """Attend to the shared prefix as one product for all rows, to each row's own tokens row by row; one softmax over both.

        For a single query the two products read keys and values faster than `scaled_dot_product_attention` (docs/LOG.md).
        """
        scores, prefix = q @ keys.transpose(-1, -2), self.prefix
        if prefix is not None:
            by_head = q.transpose(0, 1).flatten(1, 2)
            shared = (by_head @ prefix.keys[layer].transpose(-1, -2)).unflatten(1, (len(q), -1)).transpose(0, 1)
            scores = torch.cat([shared, scores], dim=-1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = self._hide(scores, window)
        weights = wide_softmax(scores)
        out = weights[..., self.prefix_length :] @ values
        if prefix is not None:
            on_prefix = weights[..., : self.prefix_length].transpose(0, 1).flatten(1, 2)
            out = out + (on_prefix @ prefix.values[layer]).unflatten(1, (len(q), -1)).transpose(0, 1)
        return out

    def _hide(self, scores: Tensor, window: int | None) -> Tensor:
        if self._mask is not None:
            scores[..., self.prefix_length :].masked_fill_(~self._mask, torch.finfo(scores.dtype).min)
        if window is not None and scores.shape[-1] > window:
            place = torch.arange(scores.shape[-1], device=scores.device)
            far = place <= (self.lengths + self.prefix_length - window)[:, None]
            scores.masked_fill_(far[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores

    def _mean_states(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "rows hidden"]:
        assert self._groups is not None
        sums = []
        for group in self._groups:
            span = states[group.token : group.token + group.count * group.length]
            total = span.unflatten(0, (group.count, group.length)).sum(1)
            if self.prefix is not None:
                total = total + self.prefix.state_sum
            sums.append(total / (group.length + self.prefix_length))
        return torch.cat(sums)


def _groups(lengths: Sequence[int], *, first_row: int) -> list[_Group]:
    groups, row, token = [], first_row, 0
    for length, same in groupby(lengths):
        count = len(list(same))
        groups.append(_Group(row, token, count, length))
        row, token = row + count, token + count * length
    return groups


class PrefixCache:
    """The newest prefixes that were read, for later calls with the same instruction.

    A change of a weight by an optimiser, or any other operation in place, makes what was read before worthless; it is read again.

    Args:
        backbone: The model.
        size: Prefixes that are kept.
    """

    def __init__(self, backbone: Backbone, *, size: int) -> None:
        self.backbone = backbone
        self.size = size
        self._kept: OrderedDict[tuple[int, bytes], SharedPrefix] = OrderedDict()

    def get(self, tokens: TokenIds) -> SharedPrefix:
        """Return a prefix, kept or read now."""
        key = sum(parameter._version for parameter in self.backbone.model.parameters()), tokens.tobytes()
        found = self._kept.pop(key, None) or self.read(tokens)
        self._kept[key] = found  # the newest comes last
        if len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return found

    @torch.inference_mode()
    def read(self, tokens: TokenIds) -> SharedPrefix:
        """Read a prefix and keep nothing of it."""
        return PackedRows(self.backbone, max_rows=1, max_tokens=len(tokens)).share(tokens)
