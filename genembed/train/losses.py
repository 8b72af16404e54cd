"""The losses of training, one value for each refinement step: GIRCSE's contrast and penalty, ranking of scored pairs, distillation."""

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
        ignore: True where a candidate is right for a query, or likely so, and must not count against it.

    Raises:
        ConfigurationError: If the temperature is not positive.
    """
    _check_temperature(temperature)
    scores = _cosines(queries, candidates) / temperature
    if ignore is not None:
        scores = scores.masked_fill(ignore, -torch.inf)
    steps, rows, _ = scores.shape
    losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), positives.repeat(steps), reduction="none")
    return losses.view(steps, rows).mean(dim=1)


def stepwise_ranking(
    queries: Float[Tensor, "pairs steps hidden"],
    candidates: Float[Tensor, "pairs steps hidden"],
    *,
    scores: Float[Tensor, "pairs"],
    temperature: float,
) -> Float[Tensor, "steps"]:
    """Rank scored pairs by their cosine, at every step on its own.

        L_k = log( 1 + sum_{i,j: score_i > score_j} exp((cos_j - cos_i) / tau) ),   cos_i = cos(z_k^q_i, z_k^d_i)    (CoSENT, Su 2022)

    Only the order of the scores counts, not their unit. 0 where all scores are equal. In at least float32.

    Args:
        queries: Embeddings z_1 .. z_K of each pair's first text, of any length.
        candidates: Embeddings of each pair's second text.
        scores: How similar the texts of each pair are, finite, on any scale that grows with similarity.
        temperature: tau, dimensionless, > 0.

    Raises:
        ConfigurationError: If the temperature is not positive.
    """
    _check_temperature(temperature)
    wide = _wide(queries, candidates)
    cosines = (_unit(queries, wide) * _unit(candidates, wide)).sum(-1).T / temperature
    above = scores[:, None] > scores[None, :]
    excess = (cosines[:, None, :] - cosines[:, :, None]).masked_fill(~above, -torch.inf)
    # The 1 under the logarithm is an exponent of zero; it also keeps a batch without any order finite.
    exponents = torch.nn.functional.pad(excess.flatten(1), (1, 0), value=0.0)
    return torch.logsumexp(exponents, dim=1)


def refinement_regulariser(step_losses: Float[Tensor, "steps"]) -> Float[Tensor, ""]:
    """Penalise every step whose loss is above that of the step before it.

        L_reg = 1/(K-1) sum_k max(log L_{k+1} - log L_k, 0)                                                  (GIRCSE, eq. 8)

    0 for a single step.
    """
    if len(step_losses) < 2:
        return step_losses.new_zeros(())
    logs = torch.log(step_losses + _LOG_FLOOR)
    return torch.relu(logs[1:] - logs[:-1]).mean()


def similarity_distillation(
    queries: Float[Tensor, "queries steps hidden"],
    candidates: Float[Tensor, "candidates steps hidden"],
    teacher_queries: Float[Tensor, "queries width"],
    teacher_candidates: Float[Tensor, "candidates width"],
    *,
    temperature: float,
    ignore: Bool[Tensor, "queries candidates"] | None = None,
) -> Float[Tensor, "steps"]:
    """Measure how far the batch's similarities are from a teacher's, at every step on its own.

        L_k = KL(P || P_k),   P_k(d | q) = softmax_d(cos(z_k^q, z_k^d) / tau),  mean over queries

    with P the same of the teacher, to which no gradient flows. Unlike Hinton et al. (2015) we do not multiply by tau^2. In at
    least float32.

    Args:
        queries: Embeddings z_1 .. z_K of the queries, of any length.
        candidates: Embeddings of all texts they are compared with.
        teacher_queries: The teacher's embeddings of the queries; their width may be another one.
        teacher_candidates: The teacher's embeddings of the candidates.
        temperature: tau of both distributions, dimensionless, > 0.
        ignore: True where a candidate is left out of a query's two distributions.

    Raises:
        ConfigurationError: If the temperature is not positive.
    """
    _check_temperature(temperature)
    student = _cosines(queries, candidates) / temperature
    teacher = _cosines(teacher_queries.detach()[:, None], teacher_candidates.detach()[:, None]) / temperature
    if ignore is not None:
        # Not -inf: a candidate outside both distributions would add 0 * (inf - inf).
        student = student.masked_fill(ignore, torch.finfo(student.dtype).min)
        teacher = teacher.masked_fill(ignore, torch.finfo(teacher.dtype).min)
    student, teacher = torch.log_softmax(student, dim=-1), torch.log_softmax(teacher, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean(-1)


def false_negatives(
    base_queries: Float[Tensor, "queries hidden"],
    base_candidates: Float[Tensor, "candidates hidden"],
    positives: Int[Tensor, "queries"],
    *,
    margin: float,
) -> Bool[Tensor, "queries candidates"]:
    """Mark the candidates that a base model finds about as similar to a query as its positive.

        cos(q, d) >= cos(q, d+) - margin                                            (after GISTEmbed, Solatorio 2024)

    A second copy of the positive is marked from a margin of 0 on; a margin a little above 0 makes that safe from rounding. The
    positive itself is never marked.

    Args:
        base_queries: The base model's embeddings of the queries, of any length.
        base_candidates: Its embeddings of all candidates.
        positives: For each query, the position of its positive among the candidates.
        margin: A difference of cosines; below 0, a candidate must be more similar than the positive by as much.
    """
    cosines = _cosines(base_queries.detach()[:, None], base_candidates.detach()[:, None])[0]
    own = positives[:, None]
    return (cosines >= cosines.gather(1, own) - margin).scatter(1, own, False)


def known_answers(
    queries: Int[Tensor, "queries keys"],
    candidates: Int[Tensor, "candidates keys"],
    answered: Int[Tensor, "candidates keys"],
    positives: Int[Tensor, "queries"],
) -> Bool[Tensor, "queries candidates"]:
    """Mark the candidates that are right for a query beside its positive: copies of that, and positives of the same query elsewhere.

    Args:
        queries: Keys of the queries; two texts are the same if they share one key, each compared with its like.
        candidates: Keys of all candidates.
        answered: For each candidate, keys of the query that it is the positive of; for a negative, keys that no query has.
        positives: For each query, the position of its positive among the candidates; never marked.
    """
    right = _same(queries, answered) | _same(candidates[positives], candidates)
    return right.scatter(1, positives[:, None], False)


def _same(first: Int[Tensor, "rows keys"], second: Int[Tensor, "columns keys"]) -> Bool[Tensor, "rows columns"]:
    return (first[:, None] == second[None]).any(-1)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigurationError(f"temperature={temperature!r}: must be positive, for example 0.02.")


def _wide(first: Tensor, second: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)


def _unit(vectors: Float[Tensor, "rows steps hidden"], dtype: torch.dtype) -> Float[Tensor, "rows steps hidden"]:
    return torch.nn.functional.normalize(vectors.to(dtype), dim=-1)


def _cosines(
    queries: Float[Tensor, "queries steps hidden"], candidates: Float[Tensor, "candidates steps hidden"]
) -> Float[Tensor, "steps queries candidates"]:
    """Compare all queries with all candidates, at every step on its own."""
    wide = _wide(queries, candidates)
    # Autocast would take the product in bfloat16, whatever the dtype of its factors.
    with torch.autocast(queries.device.type, enabled=False):
        return _unit(queries, wide).transpose(0, 1) @ _unit(candidates, wide).permute(1, 2, 0)
