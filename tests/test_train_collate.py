"""What a batch draws for itself."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from genembed import ConfigurationError
from genembed.train.collate import drawn_steps
from genembed.train.pairs import DataFile
from genembed.train.recipe import Recipe

RECIPE = Recipe(model="none", files=(DataFile(path="none.jsonl"),), updates=10)


def test_steps_are_drawn_as_the_recipe_says() -> None:
    def counts(draw_steps: Any) -> Counter[int]:
        recipe = replace(RECIPE, min_steps=1, max_steps=20, draw_steps=draw_steps)
        rng = random.Random(0)
        return Counter(drawn_steps(recipe, rng) for _ in range(20_000))

    uniform, rare = counts("uniform"), counts("log_uniform")
    assert set(uniform) == set(rare) == set(range(1, 21))
    assert uniform[20] == pytest.approx(1_000, rel=0.15)
    for steps in (1, 2, 5, 20):
        assert rare[steps] == pytest.approx(20_000 * math.log((steps + 1) / steps) / math.log(21), rel=0.2)


def test_a_way_of_drawing_steps_without_effect_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="K is always 5"):
        replace(RECIPE, draw_steps="log_uniform")
