"""A first soft-token head for an encoder that comes without one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.errors import ConfigurationError
from genembed.rows import prompt_mask
from genembed.tokens import TokenBatch, TokenIds
from genembed.train.model import TrainableEmbedder

_ROWS = 64


@torch.no_grad()
def fit_head(model: TrainableEmbedder, prompts: Sequence[TokenIds], *, ridge: float = 1.0) -> None:
    """Start the head where any state of a text points at what the text is about.

    Ridge regression from last hidden states to the text's mean input embedding, tokens weighted by rarity. Started from "each
    state names its own token" instead, the last state ([SEP]) names [SEP] for every text (docs/LOG.md).

    Args:
        model: Its head is written in place.
        prompts: Token ids of some thousand texts of the kind that will be embedded.
        ridge: Weight of the penalty.

    Raises:
        ConfigurationError: If the model has no head of its own to start.
    """
    head = model.trained_head
    if head is None:
        raise ConfigurationError("this model has no soft-token head to start.")
    rarity = _rarity(prompts, len(model.backbone.table)).to(model.backbone.device)
    width = model.backbone.hidden_size
    # The products alone are kept: all states of some thousand texts in float64 would take gigabytes.
    xx, xy = (torch.zeros(width + 1, columns, dtype=torch.float64, device=rarity.device) for columns in (width + 1, width))
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), _ROWS):
        states, topics = _states_and_topics(model, ordered[start : start + _ROWS], rarity)
        x = torch.nn.functional.pad(states.double(), (0, 1), value=1.0)
        xx += x.T @ x
        xy += x.T @ topics.double()
    # The last row and column belong to the ones: X^T (Y - mean) = X^T Y - (X^T 1) (1^T Y) / n.
    centred = xy - torch.outer(xx[:, -1], xy[-1]) / xx[-1, -1]
    penalty = ridge * torch.eye(width + 1, dtype=torch.float64, device=rarity.device)
    solution = torch.linalg.solve(xx + penalty, centred)
    head.dense.weight.copy_(solution[:-1].T)
    head.dense.bias.copy_(solution[-1])


def _rarity(prompts: Sequence[TokenIds], vocab: int) -> Float[Tensor, "vocab"]:
    """Return the inverse document frequency of every token, log(n / df)."""
    counts = torch.bincount(torch.cat([torch.from_numpy(ids).unique() for ids in prompts]), minlength=vocab)
    return torch.log(len(prompts) / counts.clamp_min(1).float())


def _states_and_topics(
    model: TrainableEmbedder, prompts: Sequence[TokenIds], rarity: Float[Tensor, "vocab"]
) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]:
    backbone = model.backbone
    batch = TokenBatch.pad(prompts, device=backbone.device)
    embeddings = backbone.embed(batch.input_ids)
    states = backbone.forward(embeddings, positions=batch.positions, mask=prompt_mask(batch.mask, backbone), cache=None, generated=False)
    weights = rarity[batch.input_ids] * batch.mask
    topics = (weights[..., None] * embeddings).sum(1) / weights.sum(1).clamp_min(1e-6)[:, None]
    return states[batch.mask], topics[:, None].expand_as(states)[batch.mask]
