"""What is checked once, when a model is loaded: that we read it as Transformers does."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from genembed.backbone import Backbone
from genembed.errors import ConfigurationError, GenembedWarning, NonFiniteError
from genembed.packed import PackedRows
from genembed.rows import CachedRows, prompt_mask
from genembed.tokens import TokenBatch, TokenIds

_LENGTHS = (5, 3)
"""Two short prompts of different length: enough to show a mask, a position or a scaling that we would get wrong."""


@torch.inference_mode()
def verify(backbone: Backbone) -> None:
    """Compare how we read a few tokens with how the model reads them itself: states, causality, logits, and packed rows.

    An architecture whose attention cannot be packed still works, in padded batches; that is announced by a warning.

    Raises:
        NonFiniteError: If the weights give no finite states.
        ConfigurationError: If we would read the model otherwise than Transformers does.
    """
    vocab, name = len(backbone.table), type(backbone.model).__name__
    prompts = [(torch.arange(length).numpy() + 7 * row) % vocab for row, length in enumerate(_LENGTHS)]
    try:
        alone = CachedRows(backbone, TokenBatch.pad(prompts[:1], device=backbone.device))
        _check_finite(alone.last_hidden, "hidden states")
        _check_reading(backbone, prompts[0], alone)
        backbone.packable = _packs(backbone, prompts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConfigurationError(
            f"{name} cannot be read from input embeddings and explicit positions, which refinement needs: {error}"
        ) from error
    if not backbone.packable:
        warnings.warn(
            f"{name} does not let texts be packed into one row: padded batches are used, which is slower.", GenembedWarning, stacklevel=2
        )


def _check_reading(backbone: Backbone, prompt: TokenIds, ours: CachedRows) -> None:
    """Compare with the model's own pass over the token ids, where it makes embeddings, positions and logits itself."""
    name = type(backbone.model).__name__
    batch = TokenBatch.pad([prompt], device=backbone.device)
    mask = prompt_mask(batch.mask, backbone)
    if not _close(ours.last_hidden, backbone.base(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state[:, -1]):
        raise ConfigurationError(
            f"{name} makes its positions or input embeddings in a way genembed does not know, so its states would be wrong."
        )
    if backbone.causal and not _reads_causally(backbone):
        raise ConfigurationError(
            f"{name} lets a token see the ones after it: it is no causal language model (BERT is read with attention='prefix')."
        )
    if backbone.has_head and backbone.trained_head is None:
        logits = backbone.model(input_ids=batch.input_ids, attention_mask=mask).logits[:, -1]
        _check_finite(logits, "logits")
        if not _close(backbone.head(ours.last_hidden), logits):
            raise ConfigurationError(
                f"{name} makes its logits in a way genembed does not know (beyond a linear head, a scale and a soft cap), so its "
                "soft tokens would be wrong; please open an issue with the model's name."
            )


def _reads_causally(backbone: Backbone) -> bool:
    """Whether a prompt's first states stay the same when its last token is another."""
    whole = torch.arange(_LENGTHS[0], device=backbone.device)
    other = whole.clone()
    other[-1] += 1
    batch = TokenBatch.pad([ids.cpu().numpy() for ids in (whole, other)], device=backbone.device)
    embeddings = backbone.embed(batch.input_ids)
    states = backbone.forward(embeddings, positions=batch.positions, mask=batch.mask, cache=None, generated=False)
    return _close(states[0, :-1], states[1, :-1])


def _packs(backbone: Backbone, prompts: list[TokenIds]) -> bool:
    steps = 0 if backbone.settings.attention == "bidirectional" else 1
    padded = CachedRows(backbone, TokenBatch.pad(prompts, device=backbone.device))
    _check_finite(padded.last_hidden, "hidden states")  # or they would look like those of a model that cannot be packed
    try:
        packed = PackedRows(backbone, max_rows=len(prompts), max_tokens=max(_LENGTHS) + steps)
        packed.admit(prompts)
        if not _close(packed.last_hidden, padded.last_hidden):
            return False
        if steps:
            embeddings = backbone.embed(torch.zeros(len(prompts), dtype=torch.long, device=backbone.device))
            for rows in (packed, padded):
                rows.append(embeddings)
        return _close(packed.last_hidden, padded.last_hidden)
    except torch.OutOfMemoryError:
        raise
    except (ConfigurationError, RuntimeError, TypeError, ValueError, AttributeError):
        return False


def _check_finite(numbers: Tensor, name: str) -> None:
    if not bool(numbers.isfinite().all()):
        raise NonFiniteError(f"{name} are not finite: the weights hold NaN or infinity, or overflow in this dtype.")


def _close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-3 if ours.dtype in (torch.float32, torch.float64) else 0.1
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-6))
