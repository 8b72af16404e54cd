"""Output forms: fewer dimensions and fewer bits, with ranges that never come from the batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from genembed import CheckpointError, ConfigurationError
from genembed.precision import (
    PRECISIONS,
    OutputForm,
    Precision,
    Ranges,
    check_dimensions,
    dequantise,
    quantise,
    ranges_from_json,
    ranges_to_json,
    truncate,
)

RANDOM = np.random.default_rng(0)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


VECTORS = unit(RANDOM.normal(size=(200, 32)))
RANGES = Ranges.of(VECTORS[:100])
SIZES = {"float32": 128, "float16": 64, "int8": 32, "uint8": 32, "binary": 4, "ubinary": 4}


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "float16"])
def test_the_codes_are_those_of_sentence_transformers(precision: Precision) -> None:
    quantization = pytest.importorskip("sentence_transformers.util.quantization", reason="sentence-transformers is not installed")
    both = np.stack([RANGES.minimum, RANGES.maximum])
    theirs = quantization.quantize_embeddings(VECTORS, precision=precision, ranges=both)
    ours = quantise(VECTORS, precision, RANGES)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_a_texts_codes_do_not_depend_on_the_texts_beside_it() -> None:
    for precision in PRECISIONS:
        np.testing.assert_array_equal(quantise(VECTORS[:1], precision, RANGES)[0], quantise(VECTORS, precision, RANGES)[0])
        np.testing.assert_array_equal(quantise(VECTORS[0], precision, RANGES), quantise(VECTORS, precision, RANGES)[0])


def test_values_outside_the_ranges_get_the_outermost_code_and_never_another_sign() -> None:
    """Guards against the overflow of eight bits, which would turn the largest value into the smallest."""
    far = np.stack([RANGES.minimum - 1, RANGES.maximum + 1])
    np.testing.assert_array_equal(quantise(far, "int8", RANGES), [[-128] * 32, [127] * 32])
    np.testing.assert_array_equal(quantise(far, "uint8", RANGES), [[0] * 32, [255] * 32])


@pytest.mark.parametrize(("precision", "least"), [("float16", 0.999999), ("int8", 0.9999), ("uint8", 0.9999), ("binary", 0.6)])
def test_what_is_restored_points_where_the_vector_did(precision: Precision, least: float) -> None:
    form = OutputForm(precision=precision, dimensions=32, ranges=RANGES)
    restored = form.restore(form(VECTORS[:100]))
    assert restored.dtype == np.float32
    assert (restored * VECTORS[:100]).sum(-1).min() > least
    np.testing.assert_allclose(np.linalg.norm(restored, axis=-1), 1, atol=1e-3)


def test_the_size_of_a_vector_is_what_it_takes() -> None:
    for precision in PRECISIONS:
        form = OutputForm(precision=precision, dimensions=32, ranges=RANGES)
        assert form(VECTORS).nbytes == len(VECTORS) * form.bytes_per_vector == len(VECTORS) * SIZES[precision]


def test_a_cut_vector_has_unit_length_and_all_dimensions_are_no_cut() -> None:
    cut = truncate(VECTORS, 8)
    np.testing.assert_allclose(cut, unit(VECTORS[:, :8]), atol=1e-6)
    assert truncate(VECTORS, 32) is VECTORS


def test_a_cut_that_was_not_trained_is_refused_with_those_that_were() -> None:
    for dimensions in (8, 16, 32):
        check_dimensions(dimensions, hidden=32, trained=(8, 16))
    with pytest.raises(ConfigurationError, match="truncate_dim=12: this model was trained to give 8, 16, 32 dimensions"):
        check_dimensions(12, hidden=32, trained=(8, 16))
    with pytest.raises(ConfigurationError, match="--dims=64: this model was not trained to give fewer than 32 dimensions"):
        check_dimensions(64, hidden=32, trained=(), name="--dims")


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "int4"}, "precision='int4': choose one of float32, float16, int8"),
        ({"precision": "int8"}, "the model has no ranges for vectors of 32 dimensions.*genembed calibrate-ranges MODEL texts.txt"),
        ({"precision": "uint8"}, "precision='uint8': the model has no ranges"),
        ({"precision": "binary", "dimensions": 12}, "eight dimensions go into a byte, and 12 do not divide"),
    ],
)
def test_a_form_that_cannot_be_is_refused_before_anything_is_embedded(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        OutputForm(**{"dimensions": 32, **values})


def test_ranges_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="ranges of 32 dimensions do not fit vectors of 8"):
        quantise(truncate(VECTORS, 8), "int8", RANGES)
    with pytest.raises(ConfigurationError, match="ranges of 0 dimensions do not fit vectors of 32"):
        dequantise(quantise(VECTORS, "int8", RANGES), "int8")


def test_ranges_without_room_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"dimension 3 goes from 0.0 to 0.0.*calibrate on more texts"):
        Ranges.of(VECTORS * (np.arange(32) != 3))
    with pytest.raises(ConfigurationError, match="ranges of 1 vectors: some hundred texts are needed"):
        Ranges.of(VECTORS[:1])


def test_ranges_survive_their_file_to_the_last_bit() -> None:
    written = json.dumps(ranges_to_json({32: RANGES, 8: Ranges.of(truncate(VECTORS, 8))}, texts=100))
    read = ranges_from_json(json.loads(written), source="ranges.json")
    assert list(read) == [32, 8]
    np.testing.assert_array_equal(read[32].minimum, RANGES.minimum)
    np.testing.assert_array_equal(read[32].maximum, RANGES.maximum)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"format_version": 2}, "r.json: format_version 2 is not 1"),
        ({"format_version": 1}, "r.json: not ranges as genembed calibrate-ranges writes them"),
        ({"format_version": 1, "dimensions": {"2": {"minimum": [0, 0], "maximum": [1, 0]}}}, "r.json: .*dimension 1 goes from"),
        ({"format_version": 1, "dimensions": {"3": {"minimum": [0, 0], "maximum": [1, 1]}}}, "2 ranges are given for 3 dimensions"),
        ({"format_version": 1, "dimensions": {"a": {"minimum": [0], "maximum": [1]}}}, "r.json: not ranges"),
    ],
    ids=str,
)
def test_a_file_of_ranges_that_cannot_be_read_is_refused_with_its_name(value: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ranges_from_json(value, source="r.json")


@pytest.mark.parametrize("largest", [1e39, float("inf"), float("nan")])
def test_ranges_that_are_not_finite_are_refused(largest: float) -> None:
    """A number beyond float32 became infinity, and every value had the same code."""
    value = {"format_version": 1, "dimensions": {"2": {"minimum": [0.0, 0.0], "maximum": [1.0, largest]}}}
    with pytest.raises(CheckpointError, match=r"dimension 1 goes from 0\.0 to (inf|nan)"):
        ranges_from_json(value, source="ranges.json")
