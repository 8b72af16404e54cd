"""Law 6: the first step of the stepwise loss is the plain contrastive loss, and one step has no penalty."""

from __future__ import annotations

import pytest
import torch

from genembed import ConfigurationError
from genembed.train.losses import refinement_regulariser, stepwise_contrastive

POSITIVES = torch.tensor([2, 0])


def embeddings(rows: int, steps: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, steps, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_contrastive(queries: torch.Tensor, candidates: torch.Tensor, temperature: float) -> torch.Tensor:
    """Equation 6 of the paper, query by query."""
    losses = []
    for query, positive in zip(queries, POSITIVES, strict=True):
        scores = torch.cosine_similarity(query[None], candidates) / temperature
        losses.append(-torch.log(scores[positive].exp() / scores.exp().sum()))
    return torch.stack(losses).mean()


def test_every_step_is_the_plain_contrastive_loss_of_that_step() -> None:
    queries, candidates = embeddings(2, 3, 0), embeddings(5, 3, 1)
    losses = stepwise_contrastive(queries, candidates, temperature=0.1, positives=POSITIVES)
    for step in range(3):
        torch.testing.assert_close(losses[step], plain_contrastive(queries[:, step], candidates[:, step], 0.1))


def test_one_step_has_a_finite_loss_and_no_penalty() -> None:
    queries = embeddings(2, 1, 0).requires_grad_(True)
    losses = stepwise_contrastive(queries, embeddings(5, 1, 1), temperature=0.02, positives=POSITIVES)
    penalty = refinement_regulariser(losses)
    (losses.mean() + penalty).backward()
    assert losses.isfinite().all()
    assert penalty.item() == 0.0
    assert queries.grad.isfinite().all()


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([4.0, 2.0, 1.0], 0.0), ([1.0, 2.0, 1.0], 0.34657359), ([1.0, 2.0, 4.0], 0.69314718), ([0.0, 0.0], 0.0)],
)
def test_only_steps_that_get_worse_are_penalised(losses: list[float], expected: float) -> None:
    """Two of these have a loss that falls again: the mean is over all K-1 pairs."""
    assert refinement_regulariser(torch.tensor(losses, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-7)


def test_an_ignored_candidate_does_not_count() -> None:
    queries, candidates = embeddings(2, 2, 0), embeddings(5, 2, 1)
    ignore = torch.zeros(2, 5, dtype=torch.bool)
    ignore[:, 4] = True
    masked = stepwise_contrastive(queries, candidates, temperature=0.1, positives=POSITIVES, ignore=ignore)
    without = stepwise_contrastive(queries, candidates[:4], temperature=0.1, positives=POSITIVES)
    torch.testing.assert_close(masked, without)


def test_bfloat16_embeddings_are_compared_in_float32() -> None:
    """In bfloat16 a similarity divided by 0.02 moves in steps of 0.25."""
    queries, candidates = embeddings(2, 2, 0).bfloat16(), embeddings(5, 2, 1).bfloat16()
    losses = stepwise_contrastive(queries, candidates, temperature=0.02, positives=POSITIVES)
    expected = stepwise_contrastive(queries.double(), candidates.double(), temperature=0.02, positives=POSITIVES)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_loss_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigurationError, match=r"must be positive, for example 0\.02"):
        stepwise_contrastive(embeddings(2, 1, 0), embeddings(3, 1, 1), temperature=temperature, positives=POSITIVES)
