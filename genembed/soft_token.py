"""The token a model speaks to itself: an average of input embeddings under its next-token distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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


def straight_through(hard: Float[Tensor, "rows hidden"], soft: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
    """Return the value of `hard` with the gradient of `soft`: the choice of one token has no gradient of its own."""
    return soft + (hard - soft).detach()


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
    return _online_average(logit_blocks, mix_blocks, temperature)[0]


def _online_average(
    logit_blocks: Sequence[Callable[[], Tensor]], mix_blocks: Sequence[Callable[[Tensor], Tensor]], temperature: float
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows 1"]]:
    """Return the average, and the logarithm of the sum of exp(logits / temperature)."""
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
    return average / normaliser, maximum + normaliser.log()


@dataclass(frozen=True)
class Scores:
    """From hidden states to the logits of a block of the vocabulary: a product, then what some families do to it.

    logits = softcap tanh(scale (h W^T + b) / softcap)
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Float[Tensor, "rows block"]) -> Float[Tensor, "rows block"]:
        """Return the logits."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def backward(self, gradient: Float[Tensor, "rows block"], logits: Float[Tensor, "rows block"]) -> Float[Tensor, "rows block"]:
        """Return the gradient of the products, from that of the logits and the logits themselves."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.scale == 1.0 else gradient * self.scale


Forward = Callable[[Tensor, Tensor, Tensor | None, Tensor, float, Scores], tuple[Tensor, Tensor]]
"""From hidden states, W, b, E, temperature and scores to the average and the log-normaliser, both in at least float32."""


def recomputed_soft_token(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, "vocab"] | None,
    embeddings: Float[Tensor, "vocab hidden"],
    *,
    temperature: float = 1.0,
    scores: Scores = Scores(),
    block: int,
    forward: Forward | None = None,
) -> Float[Tensor, "rows hidden"]:
    """Compute `soft_token` of a head's logits, differentiably, keeping nothing that is |V| wide for the backward pass.

    Blocks are computed again from the hidden state and the log-normaliser. With p the distribution, g the gradient of the
    result d, and E the embeddings, the gradients of logits x and of E are

        dx = p (g E^T - g.d) / T,      dE = p^T g

    and those of `hidden`, `weight` and `bias` follow from dx as for any linear layer. Derivatives of these gradients are not
    available.

    Args:
        hidden: What the head multiplies with `weight`.
        weight: Output embeddings W.
        bias: Added to the products.
        embeddings: Input-embedding table E; may be the same tensor as `weight`.
        temperature: T, dimensionless, > 0.
        scores: What the family does between products and logits.
        block: Vocabulary entries computed at once.
        forward: Computes the value otherwise than over blocks, as a fused kernel does.
    """
    check_temperature(temperature)
    return _Recomputed.apply(hidden, weight, bias, embeddings, temperature, scores, block, forward)  # type: ignore[no-any-return, no-untyped-call]


class _Recomputed(torch.autograd.Function):
    """Forward in one pass, by default with an online softmax over blocks; backward from the blocks computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        embeddings: Tensor,
        temperature: float,
        scores: Scores,
        block: int,
        forward: Forward | None,
    ) -> Tensor:
        compute = forward or partial(_blocked_average, block=block)
        average, log_normaliser = compute(hidden, weight, bias, embeddings, temperature, scores)
        ctx.save_for_backward(hidden, weight, bias, embeddings, average, log_normaliser)
        ctx.options = temperature, scores, block
        kind = hidden.device.type
        # The backward pass computes the logits once more, and they must be the same ones.
        ctx.autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return average.to(embeddings.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        device, enabled, dtype = ctx.autocast
        with torch.autocast(device, enabled=enabled, dtype=dtype):
            return _backward(ctx, gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, embeddings, average, log_normaliser = ctx.saved_tensors
    temperature, scores, block = ctx.options
    needs = ctx.needs_input_grad
    d_hidden = torch.zeros_like(hidden, dtype=average.dtype) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if needs[2] else None
    d_embeddings = torch.empty_like(embeddings) if needs[3] else None
    along = (gradient.to(average.dtype) * average).sum(-1, keepdim=True)
    for span in _spans(len(weight), block):
        logits = _logits(hidden, weight, bias, scores, span).to(average.dtype)
        weights = (logits / temperature - log_normaliser).exp_()
        if d_embeddings is not None:
            d_embeddings[span] = weights.to(gradient.dtype).T @ gradient
        if d_hidden is None and d_weight is None and d_bias is None:
            continue
        d_logits = weights.mul_((gradient @ embeddings[span].T).to(average.dtype) - along).div_(temperature)
        d_products = scores.backward(d_logits, logits).to(hidden.dtype)
        if d_hidden is not None:
            d_hidden += d_products @ weight[span]
        if d_weight is not None:
            d_weight[span] = d_products.T @ hidden
        if d_bias is not None:
            d_bias[span] = d_products.sum(0)
    d_input = None if d_hidden is None else d_hidden.to(hidden.dtype)
    return d_input, d_weight, d_bias, d_embeddings, None, None, None, None


def _blocked_average(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, embeddings: Tensor, temperature: float, scores: Scores, *, block: int
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    spans = _spans(len(weight), block)
    logits = [lambda span=span: _logits(hidden, weight, bias, scores, span).to(wide) for span in spans]
    mixes = [lambda weights, span=span: (weights.to(embeddings.dtype) @ embeddings[span]).to(wide) for span in spans]
    return _online_average(logits, mixes, temperature)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scores: Scores, span: slice) -> Tensor:
    return scores(torch.nn.functional.linear(hidden, weight[span], None if bias is None else bias[span]))


def _spans(length: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive."""
    if not temperature > 0:
        raise ConfigurationError(f"temperature={temperature!r}: must be positive; for the single likeliest token use tokens='hard'.")
