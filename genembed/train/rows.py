"""Sequences being refined with gradients: no padding in the linear layers, keys and values kept between steps.

One pass reads all prompts of a batch, queries and passages together, as one row [1, tokens]; one refinement step reads one
row [1, rows]. Keys and values are never written in place and never copied, so every step can be differentiated, and layers
can be checkpointed: each pass holds what its attention needs to be computed a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from genembed.attention import attend, wide_softmax
from genembed.backbone import Backbone
from genembed.rows import GrowingRows
from genembed.tokens import TokenIds

_LONGEST_UNFUSED = 512
"""Longer prompts attend in SDPA also on CPU: plain products keep weights of length x length for each head."""

LENGTH_RATIO = 1.25
"""Prompts attend in one call if the longest is at most this much longer than the shortest."""


@dataclass(frozen=True)
class _Bucket:
    """Neighbouring rows of similar length, padded for attention alone."""

    rows: slice
    tokens: Int[Tensor, "count width"]
    """Place of each token among all tokens; a token of its own row where there is padding."""
    visible: Bool[Tensor, "count width"]
    places: Int[Tensor, "tokens"]
    """Places of the tokens in the padded rows laid end to end; found on the host, so that no layer waits for the device."""


@dataclass(frozen=True)
class _PromptPass:
    """Reads prompts, and keeps their keys and values by layer and bucket."""

    owner: TrainingRows

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend within each prompt."""
        owner, outputs, kept = self.owner, [], []
        for place, bucket in enumerate(owner.buckets):
            # Laid out once: every step multiplies with them, and would copy them, and keep its copy, otherwise.
            q, k, v = (part[:, bucket.tokens].transpose(0, 1).contiguous() for part in (query, key, value))
            mask = owner.prompt_mask(place, owner.window(sliding_window))
            out = attend(q, k, v, mask, scale, softcap, fused=owner.fused or mask.shape[-1] > _LONGEST_UNFUSED)
            outputs.append(out.transpose(1, 2).flatten(0, 1)[bucket.places])
            kept.append((k.to(v.dtype), v))
        # Only the first time: a checkpointed layer is read again in the backward pass.
        owner.prompt_keys.setdefault(layer, kept)
        return torch.cat(outputs)


@dataclass(frozen=True)
class _StepPass:
    """Reads one generated position of every row."""

    owner: TrainingRows
    step: int
    """Positions generated before."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend to the row's prompt and to what it has generated; one softmax over both."""
        owner = self.owner
        generated = owner.generated_keys.setdefault(layer, [])
        if len(generated) == self.step:
            generated.append((key, value))
        keys = torch.stack([*(k for k, _ in generated[: self.step]), key], dim=2)
        values = torch.stack([*(v for _, v in generated[: self.step]), value], dim=2)
        # Query heads that share a key head are joined, so that no key is copied.
        q = query.transpose(0, 1).unflatten(1, (len(key), -1)) * scale
        window = owner.window(sliding_window)
        outputs = []
        for bucket, (k, v) in zip(owner.buckets, owner.prompt_keys[layer], strict=True):
            rows = bucket.rows
            own_k, own_v = keys[:, rows].transpose(0, 1), values[:, rows].transpose(0, 1)
            scores = torch.cat([q[rows] @ k.transpose(-1, -2), q[rows] @ own_k.transpose(-1, -2)], dim=-1)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            visible = self._visible(bucket, window)[:, None, None]
            weights = wide_softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min))
            width = k.shape[2]
            outputs.append(weights[..., :width] @ v + weights[..., width:] @ own_v)
        return torch.cat(outputs).flatten(1, 2)

    def _visible(self, bucket: _Bucket, window: int | None) -> Bool[Tensor, "count width_and_step"]:
        own = bucket.visible.new_ones(len(bucket.visible), self.step + 1)
        visible = torch.cat([bucket.visible, own], dim=1)
        if window is None:
            return visible
        length = bucket.visible.sum(1, keepdim=True)
        device = length.device
        prompt, new = torch.arange(bucket.visible.shape[1], device=device), torch.arange(self.step + 1, device=device)
        place = torch.cat([prompt.expand(len(length), -1), length + new], dim=1)
        return visible & (place > length + self.step - window)


class TrainingRows(GrowingRows):
    """Rows of one training batch.

    Args:
        backbone: The model; whatever of it requires gradients gets them.
        prompts: Token ids of all texts of the batch, in any order.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[TokenIds]) -> None:
        self.backbone = backbone
        # Sorted, so that neighbours are of similar length; every public tensor is in the caller's order.
        order = np.argsort([-len(ids) for ids in prompts], kind="stable")
        self._sorted = torch.from_numpy(order).to(backbone.device)
        self._back = torch.from_numpy(np.argsort(order)).to(backbone.device)
        ordered = [prompts[row] for row in order]
        lengths = [len(ids) for ids in ordered]
        self.lengths: Int[Tensor, "rows"] = torch.tensor(lengths, device=backbone.device)
        self.buckets = _buckets(lengths, backbone.device)
        # SDPA's backward pass on CPU is slow; elsewhere it saves the memory of the attention weights.
        self.fused = backbone.device.type != "cpu"
        self.prompt_keys: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.generated_keys: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._steps = 0
        tokens = torch.from_numpy(np.concatenate(ordered)).to(backbone.device)
        positions = torch.cat([torch.arange(length, device=backbone.device) for length in lengths])
        # A frozen reader of prompts may use its packed weights.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not backbone.adapter_on_generated_only):
            states = backbone.forward_packed(backbone.embed(tokens), positions, rows=_PromptPass(self), generated=False)
        ends = self.lengths.cumsum(0) - 1
        self.last_hidden = states[ends][self._back]
        sums = torch.cat([states[bucket.tokens].mul(bucket.visible[..., None]).sum(1) for bucket in self.buckets])
        self.mean_hidden = (sums / self.lengths[:, None])[self._back]

    def append(self, embeddings: Float[Tensor, "rows hidden"]) -> None:
        """Add one position to every row and read it."""
        view = _StepPass(self, self._steps)
        positions = self.lengths + self._steps
        states = self.backbone.forward_packed(embeddings[self._sorted], positions, rows=view, generated=True)
        self._steps += 1
        self.last_hidden = states[self._back]

    def prompt_mask(self, bucket: int, window: int | None) -> Bool[Tensor, "count 1 query_width width"]:
        """Return which tokens of its prompt each token of a bucket sees; made once for all layers."""
        if (bucket, window) not in self._masks:
            self._masks[bucket, window] = _prompt_mask(self.buckets[bucket], causal=self.backbone.causal, window=window)
        return self._masks[bucket, window]

    def window(self, sliding_window: int | None) -> int | None:
        """Return the window that holds here: a prompt that sees all of itself has none."""
        return sliding_window if self.backbone.causal else None


def _buckets(lengths: list[int], device: torch.device) -> list[_Bucket]:
    """Cut rows sorted by falling length into groups of similar length."""
    buckets, first, token = [], 0, 0
    while first < len(lengths):
        last = first
        while last < len(lengths) and lengths[first] <= LENGTH_RATIO * lengths[last]:
            last += 1
        own = torch.tensor(lengths[first:last], device=device)
        place = torch.arange(lengths[first], device=device)
        starts = token + own.cumsum(0) - own
        tokens = starts[:, None] + torch.minimum(place, own[:, None] - 1)
        visible = place < own[:, None]
        flat = torch.from_numpy(np.concatenate([row * lengths[first] + np.arange(n) for row, n in enumerate(lengths[first:last])]))
        buckets.append(_Bucket(slice(first, last), tokens, visible, flat.to(device)))
        token += sum(lengths[first:last])
        first = last
    return buckets


def _prompt_mask(bucket: _Bucket, *, causal: bool, window: int | None) -> Bool[Tensor, "count 1 query_width width"]:
    """Return which tokens of its prompt each token sees. Padding, which nothing reads, sees what the last token sees."""
    visible = bucket.visible[:, None, None, :]
    width = bucket.visible.shape[1]
    if not causal:
        return visible.expand(-1, -1, width, -1)
    place = torch.arange(width, device=bucket.visible.device)
    near = place <= place[:, None]
    if window is not None:
        near = near & (place > place[:, None] - window)
    # Padding beyond a window of its own prompt would see nothing at all, and a softmax over nothing is NaN.
    return (visible & near) | torch.eye(width, dtype=torch.bool, device=place.device)
