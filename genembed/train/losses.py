"""The training objective of GIRCSE: a contrastive loss at every refinement step, and a penalty for steps that get worse."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from genembed.errors import ConfigurationError

_LOG_FLOOR = 1e-8
"""Added under the logarithm of a step loss, as the released code does, so that a loss of zero stays finite."""


def stepwise_contrastive(
    queries: Float[Tensor, "queries steps hidden"],
    candidates: Float[Tensor, "candidates steps hidden"],
    *,
    temperature: float,
    positives: Int[Tensor, "queries"],
    ignore: Bool[Tensor, "queries candidates"] | None = None,
) -> Float[Tensor, "steps"]:
    """Contrast every query with all candidates, at every step on its own.

        L_k = -log( exp(cos(z_k^q, z_k^d+) / tau) / sum_d exp(cos(z_k^q, z_k^d) / tau) ),  mean over queries    (GIRCSE, eq. 7)

    Normalisation and loss are in at least float32: in bfloat16 a similarity divided by 0.02 would move in steps of 0.25.

    Args:
        queries: Embeddings z_1 .. z_K of the queries, of any length.
        candidates: Embeddings of all positives and negatives of the batch.
        temperature: tau, dimensionless, > 0.
        positives: For each query, the position of its positive among the candidates.
        ignore: True where a candidate is likely an unlabelled positive of a query and must not count against it.

    Raises:
        ConfigurationError: If the temperature is not positive.
    """
    if not temperature > 0:
        raise ConfigurationError(f"temperature={temperature!r}: must be positive, for example 0.02.")
    wide = torch.promote_types(queries.dtype, torch.float32)
    q = torch.nn.functional.normalize(queries.to(wide), dim=-1).transpose(0, 1)
    c = torch.nn.functional.normalize(candidates.to(wide), dim=-1).transpose(0, 1)
    scores = q @ c.transpose(1, 2) / temperature
    if ignore is not None:
        scores = scores.masked_fill(ignore, -torch.inf)
    steps, rows, _ = scores.shape
    losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), positives.repeat(steps), reduction="none")
    return losses.view(steps, rows).mean(dim=1)


def refinement_regulariser(step_losses: Float[Tensor, "steps"]) -> Float[Tensor, ""]:
    """Penalise every step whose loss is above that of the step before it.

        L_reg = 1/(K-1) sum_k max(log L_{k+1} - log L_k, 0)                                                  (GIRCSE, eq. 8)

    0 for a single step.
    """
    if len(step_losses) < 2:
        return step_losses.new_zeros(())
    logs = torch.log(step_losses + _LOG_FLOOR)
    return torch.relu(logs[1:] - logs[:-1]).mean()
