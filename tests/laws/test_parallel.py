"""Law: all steps at once are the steps one after another, exactly after as many passes as steps, and their first J after J passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import doubles
from genembed import Budget, ConfigurationError, ConvergeStop, FixedSteps
from genembed.backbone import Backbone
from genembed.budget import DEFAULT_BUDGET
from genembed.decode import Refined
from genembed.engine import Engine
from genembed.halting import HaltingRule
from genembed.refine import refine
from genembed.rows import CachedRows, additive
from genembed.tokens import TokenBatch, TokenIds

STEPS = 6
POOLS = {
    "mixed": doubles.prompts([1, 2, 3, 5, 8, 8, 13, 21]),
    "shared": doubles.prompts([1, 2, 3, 5, 8, 8, 13], shared=9, seed=1),
}
FAMILIES = ("qwen2", "mistral-window", "gemma2", "gemma3", "gpt2", "bert")
"""With and without windows, soft caps, learned positions and prefix attention."""


@cache
def backbone_of(family: str, passes: int) -> Backbone:
    return doubles.backbone(family, parallel_passes=passes)


@cache
def alone(family: str, pool: str, place: int) -> torch.Tensor:
    return doubles.alone(backbone_of(family, 0), POOLS[pool][place], STEPS)


def refined(
    backbone: Backbone, prompts: list[TokenIds], rule: HaltingRule, budget: Budget = DEFAULT_BUDGET
) -> Iterator[tuple[int, Refined, int]]:
    """Yield row by row what the engine gives: number of the text, what it came in, its place there."""
    for done in Engine(backbone, budget).run(prompts, rule, keep_trajectory=True):
        for place, row in enumerate(done.index.tolist()):
            yield row, done, place


def slow(backbone: Backbone, ids: TokenIds, passes: int) -> torch.Tensor:
    """Return z_1 .. z_K of one text after so many passes, over Transformers' own cache."""
    batch = TokenBatch.pad([ids])
    with torch.no_grad():
        rows = CachedRows(backbone, batch)
        tokens = backbone.next_embeddings(rows.last_hidden)[:, None].repeat(1, STEPS, 1)
        places = torch.arange(STEPS)
        seen = torch.cat([torch.ones(STEPS, len(ids), dtype=torch.bool), places <= places[:, None]], dim=1)
        for turn in range(passes):
            if turn:
                tokens[:, 1:] = backbone.next_embeddings(states[0, :-1])[None]
            states = backbone.forward(
                tokens, positions=len(ids) + places[None], mask=additive(seen[None, None], tokens.dtype), cache=rows.cache, generated=True
            )
            rows.cache.crop(-STEPS)
        progress = backbone.settings.pooling.start(batch.index, rows.last_hidden, rows.mean_hidden, window=0)
        found = []
        for k in range(STEPS):
            progress, _ = backbone.settings.pooling.advance(progress, states[:, k])
            found.append(progress.embedding[0])
    return torch.stack(found)


@st.composite
def cases(draw: st.DrawFn, pool: str) -> tuple[list[int], HaltingRule, Budget]:
    chosen = draw(st.lists(st.integers(0, len(POOLS[pool]) - 1), min_size=1, max_size=9))
    rule: HaltingRule = draw(
        st.one_of(
            st.builds(FixedSteps, st.integers(1, STEPS)),
            st.builds(ConvergeStop, st.sampled_from([0.6, 0.9, 0.97, 0.99]), st.integers(1, 3), st.just(1), st.just(STEPS)),
            st.lists(st.integers(1, STEPS), min_size=len(chosen), max_size=len(chosen)).map(lambda steps: doubles.Schedule(tuple(steps))),
        )
    )
    return chosen, rule, Budget(max_rows=draw(st.integers(1, 9)), length_ratio=draw(st.sampled_from([1.0, 50.0])))


@pytest.mark.parametrize("pool", list(POOLS))
@pytest.mark.parametrize("family", FAMILIES)
@given(st.data())
@examples(max_examples=6)
def test_as_many_passes_as_steps_are_exact(family: str, pool: str, data: st.DataObject) -> None:
    chosen, rule, budget = data.draw(cases(pool))
    seen = []
    for row, done, place in refined(backbone_of(family, STEPS), [POOLS[pool][own] for own in chosen], rule, budget):
        expected = alone(family, pool, chosen[row])
        steps = doubles.halting_step(expected, rule, row)
        assert done.steps[place] == steps
        np.testing.assert_allclose(done.vectors[place], expected[steps], atol=2e-7)
        seen.append(row)
    assert sorted(seen) == list(range(len(chosen)))


@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_steps_are_exact_and_the_others_are_what_the_iteration_says(family: str, passes: int) -> None:
    backbone, moved = backbone_of(family, passes), []
    for row, done, place in refined(backbone, POOLS["mixed"], FixedSteps(STEPS)):
        assert done.trajectory is not None
        found, exact = done.trajectory[place], alone(family, "mixed", row)[1:]
        np.testing.assert_allclose(found[:passes], exact[:passes], atol=2e-7)
        if not backbone.has_sliding_window:  # the slow version's mask knows none
            np.testing.assert_allclose(found, slow(backbone, POOLS["mixed"][row], passes), atol=2e-7)
        moved.append(float(np.abs(found[-1] - exact[-1].numpy()).max()))
    assert max(moved) > 1e-5, "the last step must not be exact already, or this tests nothing"


def test_steps_of_zero_generate_nothing_and_one_step_needs_one_pass() -> None:
    settings = {"pooling": doubles.PREFIX.pooling, "attention": "prefix"}
    at_once, plain = doubles.backbone("bert", **settings, parallel_passes=3), doubles.backbone("bert", **settings)
    for steps in (0, 1):
        found = {row: done.vectors[place] for row, done, place in refined(at_once, POOLS["mixed"], FixedSteps(steps))}
        for row, done, place in refined(plain, POOLS["mixed"], FixedSteps(steps)):
            np.testing.assert_allclose(found[row], done.vectors[place], atol=1e-7)


def test_a_model_that_is_read_padded_refuses_parallel_passes() -> None:
    backbone = doubles.backbone("qwen2", parallel_passes=2)
    backbone.packable = False
    with pytest.raises(ConfigurationError, match="parallel_passes=2: Qwen2ForCausalLM is read in padded batches, step by step"):
        list(Engine(backbone).run(POOLS["mixed"], FixedSteps(2)))


def test_the_reference_loop_stays_exact() -> None:
    batch = TokenBatch.pad(POOLS["mixed"])
    plain, at_once = (backbone_of("qwen2", passes) for passes in (0, 2))
    torch.testing.assert_close(refine(at_once, batch, steps=3), refine(plain, batch, steps=3), rtol=0, atol=0)
    assert replace(at_once.settings, parallel_passes=0) == plain.settings
