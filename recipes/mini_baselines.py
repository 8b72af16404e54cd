"""What `mini` is compared with: the same base, data, objective and number of updates, without generation.

    genembed train --recipe recipes/mini_baselines.py:bidirectional_avg --exclude runs/mini-data/exclude.txt --output runs/bidirectional-avg
    genembed train --recipe recipes/mini_baselines.py:eos --exclude runs/mini-data/exclude.txt --output runs/eos

The adapter reads the prompt itself here, so all of the model moves and K = 0 is all there is. The base model is the teacher that holds
it, as z_0 is that of `mini`.
"""

from __future__ import annotations

from dataclasses import replace

from mini import SETTINGS, mini

from genembed.halting import FixedSteps
from genembed.pooling import Pooling
from genembed.settings import ModelSettings
from genembed.train.pairs import DataFile
from genembed.train.recipe import Recipe

BASE = replace(SETTINGS, attention="bidirectional", pooling=Pooling(kind="mean"), halt=FixedSteps(0), adapter_positions="all")
"""all-MiniLM-L6-v2 as it is."""


def bidirectional_avg(*files: DataFile) -> Recipe:
    """Return the run of the mean over the prompt's states."""
    return _one_pass(BASE, *files)


def eos(*files: DataFile) -> Recipe:
    """Return the run of the prompt's last state."""
    return _one_pass(replace(BASE, pooling=Pooling(kind="last")), *files)


def _one_pass(settings: ModelSettings, *files: DataFile) -> Recipe:
    recipe = mini(*files)
    assert recipe.evaluation is not None
    return replace(
        recipe,
        settings=settings,
        served=None,
        teacher=recipe.model,
        teacher_settings=BASE,
        objective=replace(recipe.objective, regulariser=0.0),
        evaluation=replace(recipe.evaluation, steps=(0,)),
        min_steps=0,
        max_steps=0,
        draw_steps="uniform",
        fit_head=0,
        head_tokens=0,
        learning_rate=3e-4,
    )
