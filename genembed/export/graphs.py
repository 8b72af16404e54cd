"""The two graphs of a refinement, written so that they can be traced: keys and values go in and out as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.pytorch_utils import Conv1D

from genembed.attention import ATTENTION_NAME, attend
from genembed.backbone import Backbone
from genembed.soft_token import hard_token, soft_token

EXPORT_ATTENTION = "genembed-export"
"""Name under which the attention of the graphs is registered with Transformers."""

_UNUSED_MASK = (1, 1, 1, 1)
"""Shape of the mask given to Transformers: a 4-D one is handed through untouched, and our attention has its own."""


class TensorCache:
    """Keys and values of every layer as tensors, and who sees whom."""

    def __init__(self, visible: Bool[Tensor, "rows 1 queries keys"], past: Sequence[Tensor] = ()) -> None:
        self.visible = visible
        self.past = past
        self.present: list[Tensor] = []
        """Keys and values of the layers so far, in turns."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend in the next layer over what it has kept and what is new."""
        if self.past:
            layer = len(self.present)
            key, value = (torch.cat([old, new], dim=2) for old, new in zip(self.past[layer : layer + 2], (key, value), strict=True))
        self.present += [key, value]
        mask = self.visible if window is None else self.visible & _within(window, query, key)
        return attend(query, key, value, mask, scale, softcap, fused=False)


def _within(window: int, query: Tensor, key: Tensor) -> Bool[Tensor, "queries keys"]:
    """Tell which keys lie in the window of each query, which ends at the query itself."""
    places, queries = torch.arange(key.shape[2]), torch.arange(query.shape[2])
    return places[None, :] > queries[:, None] + (key.shape[2] - query.shape[2] - window)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, kept: TensorCache, **kwargs: Any
) -> tuple[Tensor, None]:
    scale, window, softcap = (kwargs.get(name) for name in ("scaling", "sliding_window", "softcap"))
    mixed = kept.attend(query, key, value, scale=scale, window=window, softcap=softcap)
    # The exporter takes the sizes after `unflatten` for those of the traced batch; those of the query it knows to change.
    mixed = mixed.reshape(query.shape)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(EXPORT_ATTENTION, _attention)
AttentionMaskInterface.register(EXPORT_ATTENTION, sdpa_mask)


@contextmanager
def traceable(backbone: Backbone) -> Iterator[None]:
    """Let a backbone read through `TensorCache`, and give it its own attention back afterwards."""
    parts: list[Any] = list({id(part): part for part in (backbone.base, backbone.stepper)}.values())
    products: list[Any] = [module for part in parts for module in part.modules() if isinstance(module, Conv1D)]
    try:
        for part in parts:
            part.set_attn_implementation(EXPORT_ATTENTION)
        for product in products:
            product.forward = partial(_product, product)
        yield
    finally:
        for part in parts:
            part.set_attn_implementation(ATTENTION_NAME)
        for product in products:
            vars(product).pop("forward", None)


def _product(module: Any, states: Float[Tensor, "rows length hidden"]) -> Float[Tensor, "rows length out"]:
    """Do what a linear layer of GPT-2 does; its own `forward` puts the sizes of the traced batch into the graph."""
    mixed: Tensor = states @ module.weight + module.bias
    return mixed


def _read(part: nn.Module, embeddings: Tensor, positions: Tensor, kept: TensorCache) -> Float[Tensor, "rows length hidden"]:
    unused = embeddings.new_zeros(_UNUSED_MASK)
    output = part(inputs_embeds=embeddings, position_ids=positions, attention_mask=unused, use_cache=False, kept=kept)
    return output.last_hidden_state  # type: ignore[no-any-return]


class PrefillGraph(nn.Module):
    """Reads padded prompts: last and mean state of each, and what the steps need of every layer."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.base, self.embedding = backbone.base, backbone.embedding
        self.causal = backbone.causal

    def forward(
        self, input_ids: Int[Tensor, "rows prompt"], mask: Bool[Tensor, "rows prompt"], positions: Int[Tensor, "rows prompt"]
    ) -> tuple[Tensor, ...]:
        """Return last states, mean states, and keys and values of every layer in turns."""
        place = torch.arange(mask.shape[1])
        visible = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        kept = TensorCache(visible & (place[None, :] <= place[:, None]) if self.causal else visible)
        states = _read(self.base, self.embedding(input_ids), positions, kept)
        # Not `rows.summarise`: its row numbers would be those of the traced batch.
        newest = (mask * (place + 1)).argmax(-1)
        last = states.gather(1, newest[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]
        weights = mask.to(states.dtype)[..., None]
        return (last, (states * weights).sum(1) / weights.sum(1), *kept.present)


class StepGraph(nn.Module):
    """One refinement step: from the newest state to the soft token, and from there to the next state.

    Args:
        backbone: The model.
        untied: Keep the output embeddings apart from the input embeddings, transposed. onnxruntime's quantisation turns a shared table
            round for one of its two products, and the other one no longer fits.
    """

    def __init__(self, backbone: Backbone, *, untied: bool) -> None:
        super().__init__()
        self.output = backbone.head.weight.T.contiguous() if untied else None
        self.stepper, self.head = backbone.stepper, backbone.head
        self.trained = backbone.trained_head
        self.spoken = backbone.spoken
        self.scale = backbone.embedding_scale
        self.hard, self.temperature = backbone.settings.tokens == "hard", backbone.settings.temperature

    def forward(
        self, last_hidden: Float[Tensor, "rows hidden"], mask: Bool[Tensor, "rows length"], positions: Int[Tensor, "rows"], *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the next states, and keys and values of every layer with the new position.

        Args:
            last_hidden: Newest state of each row.
            mask: Where there is a text, over the kept positions and the new one.
            positions: Of the new position in each text.
            past: Keys and values of every layer in turns.
        """
        logits = self.head(last_hidden) if self.output is None else self._untied(last_hidden, self.output)
        token = hard_token(logits, self.spoken) if self.hard else soft_token(logits, self.spoken, temperature=self.temperature)
        kept = TensorCache(mask[:, None, None, :], past)
        states = _read(self.stepper, (token * self.scale)[:, None], positions[:, None], kept)
        return (states[:, -1], *kept.present)

    def _untied(self, last_hidden: Float[Tensor, "rows hidden"], output: Float[Tensor, "hidden vocab"]) -> Float[Tensor, "rows vocab"]:
        products = self.head.prepare(last_hidden) @ output
        return self.head.finish(products if self.head.bias is None else products + self.head.bias)
