"""What a halting rule would have done: rules replayed on the stability of texts that were refined to the end."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int

from genembed.errors import ConfigurationError
from genembed.halting import NOT_MEASURED, HaltingRule, Progress


def halting_steps(stability: Float[np.ndarray, "texts steps_minus_1"], rule: HaltingRule) -> Int[np.ndarray, "texts"]:
    """Return k* of each text, without running the model.

    Args:
        stability: s_2 .. s_K of each text, refined to the end.
        rule: A rule that reads steps and cosines alone; the embedding it is shown is zero.

    Raises:
        ConfigurationError: If the rule goes beyond K, or K texts' cosines are missing.
    """
    texts, recorded = len(stability), stability.shape[1] + 1
    if rule.max_steps > recorded:
        raise ConfigurationError(f"{rule} goes to step {rule.max_steps}, but the texts were refined {recorded} steps only.")
    if np.isnan(stability[:, : max(rule.max_steps - 1, 0)]).any():
        raise ConfigurationError("stability has missing values: refine the texts to the end, with halt=FixedSteps(K).")
    # s_k is in column window + k - 2; before s_2 nothing is measured.
    measured = np.concatenate([np.full((texts, rule.window), NOT_MEASURED), stability], axis=1)
    cosines, none = torch.from_numpy(measured), torch.zeros(texts, 0)
    steps = np.full(texts, rule.max_steps, dtype=np.int64)
    for k in range(rule.max_steps - 1, 0, -1):
        window = cosines[:, k - 1 : k - 1 + rule.window]
        progress = Progress(torch.arange(texts), torch.full((texts,), k), none, torch.zeros(texts), none, window)
        steps[rule(progress).numpy()] = k
    return steps
