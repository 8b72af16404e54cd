"""What is checked once, when a model is loaded: that we read it as Transformers does."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from genembed.backbone import Backbone
from genembed.errors import ConfigurationError, GenembedWarning, NonFiniteError
from genembed.packed import PackedRows
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch

_LENGTHS = (5, 3)
"""Two short prompts of different length: enough to show a mask, a position or a scaling that we would get wrong."""


@torch.inference_mode()
def verify(backbone: Backbone) -> None:
    """Compare our head and our packed attention with the model's own, on a few tokens.

    An architecture whose attention cannot be packed still works, in padded batches; that is announced by a warning.

    Raises:
        NonFiniteError: If the weights give no finite states.
        ConfigurationError: If the model makes its logits in a way we do not reproduce.
    """
    vocab = len(backbone.table)
    prompts = [(torch.arange(length).numpy() + 7 * row) % vocab for row, length in enumerate(_LENGTHS)]
    batch = TokenBatch.pad(prompts, device=backbone.device)
    rows = CachedRows(backbone, batch)
    if not bool(rows.last_hidden.isfinite().all()):
        raise NonFiniteError("hidden states are not finite: the weights hold NaN or infinity, or overflow in this dtype.")
    if backbone.trained_head is None and backbone.causal:
        own = backbone.model(input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.positions).logits[:, -1]
        if not _close(backbone.head(rows.last_hidden), own):
            raise ConfigurationError(
                f"{type(backbone.model).__name__} makes its logits in a way genembed does not know (beyond a linear head, a scale and a "
                "soft cap), so its soft tokens would be wrong; please open an issue with the model's name."
            )
    backbone.packable = _packs(backbone, [*prompts], rows)
    if not backbone.packable:
        warnings.warn(
            f"{type(backbone.model).__name__} does not let texts be packed into one row: padded batches are used, which is slower.",
            GenembedWarning,
            stacklevel=2,
        )


def _packs(backbone: Backbone, prompts: list[object], padded: CachedRows) -> bool:
    steps = 0 if backbone.settings.attention == "bidirectional" else 1
    try:
        packed = PackedRows(backbone, max_rows=len(prompts), max_tokens=max(_LENGTHS) + steps)
        packed.admit(prompts)  # type: ignore[arg-type]
        if not _close(packed.last_hidden, padded.last_hidden):
            return False
        if steps:
            embeddings = backbone.embed(torch.zeros(len(prompts), dtype=torch.long, device=backbone.device))
            for rows in (packed, padded):
                rows.append(embeddings)
        return _close(packed.last_hidden, padded.last_hidden)
    except (ConfigurationError, RuntimeError, TypeError, ValueError, AttributeError):
        return False


def _close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-3 if ours.dtype in (torch.float32, torch.float64) else 0.1
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-6))
