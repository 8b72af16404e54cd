"""The token a model speaks to itself: an average of input embeddings under its next-token distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.errors import ConfigurationError


def soft_token(
    logits: Float[Tensor, "rows vocab"],
    embeddings: Float[Tensor, "vocab hidden"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "rows hidden"]:
    """Average the input embeddings under the next-token distribution.

        d = softmax(logits / temperature) @ embeddings        (GIRCSE, section 3.2, equations 5 and 6)

    The softmax is taken in at least float32 for any input dtype; the result has the dtype of `embeddings`.

    Args:
        logits: Unnormalised log-probabilities (nats) at the last position.
        embeddings: Input-embedding table of the backbone.
        temperature: Dimensionless, > 0. Towards 0 the result tends to the embedding of the likeliest token.

    Raises:
        ConfigurationError: If `temperature` is not positive.
    """
    check_temperature(temperature)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits.to(wide) / temperature, dim=-1).to(embeddings.dtype) @ embeddings


def hard_token(logits: Float[Tensor, "rows vocab"], embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "rows hidden"]:
    """Return the input embedding of the likeliest token, as InBedder-style baselines generate."""
    return embeddings[logits.argmax(dim=-1)]


def blocked_soft_token(
    logit_blocks: Sequence[Callable[[], Float[Tensor, "rows block"]]],
    mix_blocks: Sequence[Callable[[Float[Tensor, "rows block"]], Float[Tensor, "rows hidden"]]],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "rows hidden"]:
    """Compute `soft_token` one block of the vocabulary at a time, so that no |V|-wide tensor exists.

    The online softmax keeps a running maximum m, normaliser l and average a; a block with logits x updates

        m' = max(m, max x),   l' = l e^(m-m') + sum e^(x-m'),   a' = a e^(m-m') + e^(x-m') @ E_block

    Args:
        logit_blocks: Each gives the logits (nats) of its block of the vocabulary; they are overwritten.
        mix_blocks: Each multiplies weights over its block by that block's input embeddings.
        temperature: Dimensionless, > 0.
    """
    check_temperature(temperature)
    maximum = normaliser = average = torch.empty(0)
    for position, (logits_of, mix) in enumerate(zip(logit_blocks, mix_blocks, strict=True)):
        logits = logits_of()
        if temperature != 1.0:
            logits.div_(temperature)
        top = logits.amax(dim=-1, keepdim=True)
        if position == 0:
            weights = logits.sub_(top).exp_()
            maximum, normaliser, average = top, weights.sum(dim=-1, keepdim=True), mix(weights)
            continue
        top = torch.maximum(maximum, top)
        weights = logits.sub_(top).exp_()
        shrink = (maximum - top).exp_()
        normaliser = normaliser.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
        average = average.mul_(shrink).add_(mix(weights))
        maximum = top
    return average / normaliser


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive."""
    if not temperature > 0:
        raise ConfigurationError(f"temperature={temperature!r}: must be positive; for the single likeliest token use tokens='hard'.")
