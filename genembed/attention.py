"""One attention function for every backbone: Transformers' own for padded batches, ours for packed rows.

Transformers hands each layer's queries, keys and values to a function registered by name, and passes unknown keyword
arguments of the model's forward through to it. So packed attention works for any backbone without rewriting a model.
"""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from genembed.errors import ConfigurationError

ATTENTION_NAME = "genembed"
"""Name under which our attention is registered with Transformers."""


@runtime_checkable
class PackedAttention(Protocol):
    """Texts read as one row: what attends within each of them."""

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


_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


def attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads length head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Tensor | None,
    *,
    packed: PackedAttention | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch length heads head_dim"], None]:
    """Attend within a padded batch, or within each text of packed rows."""
    softcap, scaling = kwargs.pop("softcap", None), kwargs.get("scaling")
    for name in _UNSUPPORTED:
        # SDPA ignores them without a word, and the states would be wrong.
        if kwargs.get(name) is not None:
            raise ConfigurationError(f"{type(module).__name__} uses {name} in its attention, which genembed cannot do; use another model.")
    if packed is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = cast("int", module.layer_idx)
        return packed.attend(layer, query[0], key[0], value[0], scale, kwargs.get("sliding_window"), softcap)[None], None
    if softcap is not None:
        mask = attention_mask if attention_mask is not None else _causal(query, key)
        return attend(query, key, value, mask, scaling, softcap).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def attend(
    query: Float[Tensor, "batch heads length head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None = None,
    *,
    fused: bool = True,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Attend, sharing each key head among a group of query heads.

    Args:
        query: Queries.
        key: Keys, one head for every `heads / kv_heads` query heads.
        value: Values, as the keys.
        mask: True (or 0, when it is added) where a query sees a key; None when it sees all.
        scale: Factor on the scores; None for 1/sqrt(head_dim).
        softcap: Limit of the scores by softcap * tanh(score / softcap) (Gemma 2), which SDPA cannot do.
        fused: Use SDPA where it can; False for plain products, whose backward pass on CPU is several times faster for short texts.
    """
    groups = query.shape[1] // key.shape[1]
    if fused and softcap is None:
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # Query heads that share a key head are joined, so that no key is copied. Scaled before the product, which could overflow
    # half precision.
    joined = query.unflatten(1, (-1, groups)).flatten(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (joined @ key.transpose(-1, -2)).unflatten(2, (groups, -1))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        mask = mask[:, :, None] if mask.dim() == 4 else mask
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    mixed = wide_softmax(scores).flatten(2, 3) @ value
    return cast("Tensor", mixed.unflatten(2, (groups, -1)).flatten(1, 2))


def wide_softmax(scores: Float[Tensor, "*batch keys"]) -> Float[Tensor, "*batch keys"]:
    """Softmax over the last dimension in at least float32, as fused attention takes it; the result has the dtype of `scores`."""
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    length, keys = query.shape[2], key.shape[2]
    return torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)


AttentionInterface.register(ATTENTION_NAME, attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
