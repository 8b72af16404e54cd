"""GIRCSE's stepwise objective as a loss of sentence-transformers' trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from genembed.errors import ConfigurationError
from genembed.train.objective import Objective


class StepwiseLoss(nn.Module):
    """Contrast every query with all texts of the other columns, at every refinement step: equations 7 and 8 of GIRCSE.

    Columns are (anchor, positive) or (anchor, positive, negative, ...); every other row's positive, and every negative, counts
    against an anchor. `SentenceTransformerTrainer(model, train_dataset=..., loss=StepwiseLoss(model))`.
    """

    def __init__(self, model: Any, objective: Objective | None = None) -> None:
        """Set the loss up.

        Args:
            model: A `SentenceTransformer` whose first module is a `GenerativeEmbedding`; its `halt` says how many steps are trained.
            objective: The loss at every step and what is added to it; GIRCSE's own if None. One that needs a teacher cannot be used.

        Raises:
            ConfigurationError: If the objective needs a teacher.
        """
        super().__init__()
        self.model = model
        self.objective = Objective() if objective is None else objective
        if self.objective.needs_teacher:
            raise ConfigurationError(
                f"{self.objective}: distillation and false_negative_margin need a teacher, which this trainer does not bring; "
                "use genembed train, or leave them out."
            )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Float[Tensor, ""]:
        """Return the loss of a batch; the trainer calls this.

        Args:
            sentence_features: For each column its tokens.
            labels: Not used: which texts belong together follows from their rows.
        """
        queries, *candidates = [self.model(features)["trajectory"] for features in sentence_features]
        return self.objective(queries, torch.cat(candidates), positives=torch.arange(len(queries), device=queries.device)).total

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card says of the loss."""
        return {"objective": repr(self.objective)}
