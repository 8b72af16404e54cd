"""The decoder from scratch: it starts as the bag of token embeddings it is made from, and its recipes are ones that can be trained."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import genembed
from genembed import FixedSteps

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

TEXTS = [
    "A language model refines the vector of a text step by step, and stops when it is stable.",
    "What is considered a business expense on a business trip?",
    "Alpha-lipoic acid lowers fasting glucose in patients with diabetes.",
    "Vector.",
]


@pytest.fixture(scope="module")
def modules() -> tuple[Any, Any]:
    if not (RECIPES / "decoder.py").is_file():
        pytest.skip("the recipes are not here: they come with the repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield importlib.import_module("decoder"), importlib.import_module("decoder_data")
    for name in ("decoder", "decoder_data"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def made(modules: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A bag with random vectors whose tokens count very differently, and the folder of its decoder."""
    _, data = modules
    folder, generator = tmp_path_factory.mktemp("decoder"), torch.Generator().manual_seed(0)
    tokenizer = data.new_tokenizer(iter(TEXTS))
    embeddings = torch.randn(len(tokenizer), 256, generator=generator)
    bag = data.Bag(embeddings, 30 * torch.randn(256, generator=generator) / 256**0.5).requires_grad_(False)
    data.decoder_of(bag, end=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_bag(bag, folder)
    return bag, folder


def test_the_decoder_starts_as_the_bag(modules: tuple[Any, Any], made: tuple[Any, Path]) -> None:
    recipes, data = modules
    _, folder = made
    expected = data.bag_vectors(folder, TEXTS)
    ours = genembed.load(folder, preset=recipes.CAUSAL_EOS).encode(TEXTS)
    # The end-of-sequence token is in the sum too, with the least weight that attention can give it.
    assert ((ours * expected).sum(1) > [0.99, 0.99, 0.99, 0.9]).all()
    assert np.abs(ours @ ours.T - expected @ expected.T).max() < 0.1


def test_the_bag_weighs_tokens_as_its_formula_says(modules: tuple[Any, Any], made: tuple[Any, Path]) -> None:
    bag, _ = made
    ids = np.asarray([3, 40, 3, 200])
    normed = bag.embeddings / bag.embeddings.square().mean(1, keepdim=True).sqrt()
    weights = torch.exp(normed[ids] @ bag.weighting / 256)
    expected = torch.nn.functional.normalize((weights[:, None] * normed[ids]).sum(0), dim=0)
    torch.testing.assert_close(bag([np.asarray([7]), ids])[1], expected, rtol=1e-4, atol=1e-5)


def test_both_ways_and_generating_it_can_be_read_too(modules: tuple[Any, Any], made: tuple[Any, Path]) -> None:
    recipes, data = modules
    _, folder = made
    both_ways = genembed.load(folder, preset=recipes.BIDIRECTIONAL_AVG).encode(TEXTS)
    assert ((both_ways * data.bag_vectors(folder, TEXTS)).sum(1) > 0.85).all()  # with a part of each token's own embedding
    refined = genembed.load(folder, preset=recipes.GIRCSE).refine(TEXTS, halt=FixedSteps(3))
    assert np.isfinite(refined.vectors).all()


def test_all_recipes_see_the_same_pairs_as_often(modules: tuple[Any, Any]) -> None:
    recipes, _ = modules
    one, other, refined = recipes.causal_eos(), recipes.bidirectional_avg(), recipes.gircse()
    for name in ("model", "files", "queries", "updates", "learning_rate", "seed", "query_tokens", "passage_tokens"):
        assert getattr(one, name) == getattr(other, name) == getattr(refined, name), name
    assert recipes.eos().model == str(recipes.START)
    assert recipes.eos().seed != one.seed  # other batches than those that follow


def test_no_source_of_the_decoder_is_unfiltered(modules: tuple[Any, Any]) -> None:
    """Guards against bge_example_data, the one training file that was not compared with the evaluation sets."""
    recipes, _ = modules
    assert "bge_example_data" not in recipes.SOURCES
