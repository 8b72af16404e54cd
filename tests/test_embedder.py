"""The public face: any text in, a unit vector out, or an error that names the row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import doubles
from genembed import (
    CheckpointError,
    ConfigurationError,
    ConvergeStop,
    Embedder,
    FixedSteps,
    InputError,
    ModelSettings,
    Pooling,
    load,
)
from genembed.settings import BIDIRECTIONAL_AVG, CAUSAL_EOS

TEXTS = ["What is a business trip?", "x", "A language model refines the vector of a text step by step.", "claim " * 30, "y z"]
SHORT = ModelSettings(max_length=12, halt=FixedSteps(2))


@pytest.fixture
def embedder(embedder_of: Callable[..., Embedder]) -> Embedder:
    return embedder_of("qwen2")


def test_vectors_have_unit_length_float32_and_the_callers_order(embedder: Embedder) -> None:
    vectors = embedder.encode(TEXTS, steps=3)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.ones(5), atol=1e-6)
    for vector, text in zip(vectors, TEXTS, strict=True):
        np.testing.assert_allclose(vector, embedder.encode(text, steps=3), atol=2e-7)


def test_the_order_of_the_texts_does_not_matter(embedder: Embedder) -> None:
    order = [3, 0, 4, 2, 1]
    rule = ConvergeStop(0.97, patience=1)
    one, other = embedder.refine(TEXTS, halt=rule), embedder.refine([TEXTS[place] for place in order], halt=rule)
    np.testing.assert_allclose(other.vectors, one.vectors[order], atol=2e-7)
    assert other.steps.tolist() == one.steps[order].tolist()


def test_texts_beyond_one_window_keep_their_place_and_their_row_in_errors(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = embedder.encode(TEXTS, steps=2)
    monkeypatch.setattr("genembed.embedder._WINDOW", 2)
    np.testing.assert_allclose(embedder.encode(TEXTS, steps=2), expected, atol=2e-7)
    with pytest.raises(InputError, match="row 4: the text '' has no tokens"):
        embedder.encode([*TEXTS[:4], ""], steps=2)


def test_a_rule_knows_each_text_by_its_place_in_the_callers_list(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against places that begin again at every window of a long list."""

    planned = [1 + place % 3 for place in range(len(TEXTS))]
    monkeypatch.setattr("genembed.embedder._WINDOW", 2)
    assert embedder.refine(TEXTS, halt=doubles.Schedule(tuple(planned))).steps.tolist() == planned


def test_a_string_gives_one_vector_and_a_list_gives_rows(embedder: Embedder) -> None:
    assert embedder.encode("x", steps=1).shape == (doubles.HIDDEN,)
    np.testing.assert_array_equal(embedder.encode(["x"], steps=1)[0], embedder.encode("x", steps=1))
    assert embedder.get_embedding_dimension() == doubles.HIDDEN


def test_an_empty_list_gives_no_rows_of_the_right_width(embedder: Embedder) -> None:
    assert embedder.encode([]).shape == (0, doubles.HIDDEN)
    refined = embedder.refine([], halt=FixedSteps(3), keep_trajectory=True)
    assert (refined.stability.shape, refined.trajectory.shape) == ((0, 2), (0, 3, doubles.HIDDEN))
    assert (refined.steps.tolist(), refined.tokens.tolist(), refined.truncated.tolist()) == ([], [], [])


@pytest.mark.parametrize("texts", [("x", "y z"), np.array(["x", "y z"]), iter(["x", "y z"])], ids=["tuple", "array", "iterator"])
@pytest.mark.usefixtures("untyped_caller")
def test_any_iterable_of_strings_is_a_list_of_texts(embedder: Embedder, texts: Any) -> None:
    np.testing.assert_allclose(embedder.encode(texts, steps=1), embedder.encode(["x", "y z"], steps=1), atol=2e-7)


def test_an_empty_string_is_refused_by_row_and_welcome_under_an_instruction(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="row 1: the text '' has no tokens"):
        embedder.encode(["x", ""], steps=1)
    np.testing.assert_allclose(
        embedder.encode("", instruction="Find", steps=1), embedder.encode("Instruct: Find\nQuery:", steps=1), atol=2e-7
    )


@pytest.mark.parametrize("text", [" ", "\n\n\t", "\0", "a\0b", "🙂", "é", "e\u0301", "\ufeff", "\u202e", "0" * 300])
def test_odd_texts_have_finite_unit_vectors_that_do_not_depend_on_neighbours(embedder: Embedder, text: str) -> None:
    vectors = embedder.encode(["x", text, "y z"], steps=2)
    np.testing.assert_allclose(vectors[1], embedder.encode(text, steps=2), atol=2e-7)
    assert np.linalg.norm(vectors[1]) == pytest.approx(1.0, abs=1e-6)


def test_a_lone_surrogate_is_refused_by_row(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="row 2: character 0 is a lone surrogate"):
        embedder.encode(["x", "y", "\udc00"], steps=1)


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("value", [None, 3, 2.5, b"bytes", ["nested"], {"text": "x"}])
def test_what_is_not_a_string_is_a_type_error_with_its_row(embedder: Embedder, value: Any) -> None:
    with pytest.raises(TypeError, match=f"row 1: expected a string, got {type(value).__name__}"):
        embedder.encode(["x", value], steps=1)


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("value", ["one text", b"one text"])
def test_refine_refuses_a_single_string_instead_of_reading_its_letters(embedder: Embedder, value: Any) -> None:
    with pytest.raises(TypeError, match=r"texts is a single (str|bytes): refine takes a list, \[text\]"):
        embedder.refine(value)


def test_a_text_of_a_megabyte_is_cut_flagged_and_counted_in_one_warning(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("qwen2", SHORT)
    texts = ["x", "a" * 1_000_000, "b" * 500, "y"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refined = embedder.refine(texts)
    assert [str(warning.message) for warning in caught] == [
        "2 of 4 texts were longer than 12 tokens (the longest has 1000000) and lost their end; see Refinement.truncated, or use "
        "truncate='error'."
    ]
    assert refined.truncated.tolist() == [False, True, True, False]
    assert refined.tokens.tolist() == [1, 12, 12, 1]
    np.testing.assert_allclose(refined.vectors[1], embedder.encode("a" * 12), atol=2e-7)


@pytest.mark.parametrize("length", range(9, 16))
def test_lengths_around_the_limit_are_read_whole_up_to_the_limit_itself(embedder_of: Callable[..., Embedder], length: int) -> None:
    """vLLM hangs on an input of exactly the limit (its issue 29496), and on a short one before a truncated one (55427)."""
    embedder = embedder_of("qwen2", SHORT)
    for texts in (["q" * length], ["x", "q" * length], ["q" * length, "x"], ["q" * length, "q" * 40]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            refined = embedder.refine(texts)
        assert refined.truncated.tolist() == [len(text) > 12 for text in texts]
        assert refined.tokens.tolist() == [min(len(text), 12) for text in texts]
        np.testing.assert_allclose(refined.vectors[0], embedder.encode(texts[0][:12]), atol=2e-7)


def test_truncation_can_be_an_error_that_names_the_row(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("qwen2", SHORT)
    with pytest.raises(InputError, match=r"row 2: the text does not fit into 12 tokens; shorten .*allow truncate='right'"):
        embedder.encode(["x", "y", "b" * 500], truncate="error")
    assert embedder.encode(["x", "y"], truncate="error").shape == (2, doubles.HIDDEN)


@pytest.mark.usefixtures("untyped_caller")
def test_an_unknown_way_to_truncate_is_refused(embedder: Embedder) -> None:
    with pytest.raises(ConfigurationError, match="truncate='left': choose 'right' or 'error'"):
        embedder.encode(["x"], truncate="left")


@pytest.mark.usefixtures("untyped_caller")
def test_an_unknown_option_is_an_error_and_not_ignored(embedder: Embedder) -> None:
    with pytest.raises(TypeError, match="batch_size"):
        embedder.encode(["x"], batch_size=32)


def test_refine_tells_what_happened_to_each_text(embedder: Embedder) -> None:
    rule = ConvergeStop(0.97, patience=1, max_steps=12)
    refined = embedder.refine(TEXTS, halt=rule, keep_trajectory=True)
    assert refined.vectors.shape == (5, doubles.HIDDEN)
    assert refined.stability.shape == (5, 11)
    assert refined.trajectory.shape == (5, 12, doubles.HIDDEN)
    assert refined.tokens.tolist() == [len(ids) for ids in embedder.tokenizer(TEXTS).ids]
    assert refined.truncated.tolist() == [False] * 5
    assert len(set(refined.steps.tolist())) > 1, "the rule halts every text at once, so this test shows nothing"
    for row, steps in enumerate(refined.steps):
        np.testing.assert_array_equal(refined.trajectory[row, steps - 1], refined.vectors[row])
        assert np.isfinite(refined.trajectory[row, :steps]).all()
        assert np.isnan(refined.trajectory[row, steps:]).all()
        assert np.isfinite(refined.stability[row, : steps - 1]).all()
        assert np.isnan(refined.stability[row, steps - 1 :]).all()
        assert steps == 12 or refined.stability[row, steps - 2] >= 0.97


def test_without_keep_trajectory_none_is_kept(embedder: Embedder) -> None:
    assert embedder.refine(["x"], steps=2).trajectory is None


def test_encode_gives_the_vectors_of_refine(embedder: Embedder) -> None:
    rule = ConvergeStop(0.97, patience=1)
    np.testing.assert_array_equal(embedder.encode(TEXTS, halt=rule), embedder.refine(TEXTS, halt=rule).vectors)


def test_steps_are_short_for_a_rule_and_not_both_may_be_given(embedder: Embedder) -> None:
    np.testing.assert_array_equal(embedder.encode(TEXTS, steps=2), embedder.encode(TEXTS, halt=FixedSteps(2)))
    with pytest.raises(ConfigurationError, match=r"halt=FixedSteps\(steps=2\) and steps=2 both say when to stop; give one of them"):
        embedder.encode(TEXTS, steps=2, halt=FixedSteps(2))


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize("rule", [0.998, "FixedSteps", lambda progress: progress.step >= 2])
def test_what_is_no_halting_rule_is_refused_with_examples(embedder: Embedder, rule: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a halting rule such as ConvergeStop\(threshold=0\.998\) or FixedSteps\(20\)"):
        embedder.encode(["x"], halt=rule)


def test_without_a_rule_the_models_own_is_used(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("qwen2", SHORT)
    assert embedder.refine(["x", "y"]).steps.tolist() == [2, 2]


def test_a_step_count_the_model_cannot_follow_is_refused(embedder_of: Callable[..., Embedder]) -> None:
    with pytest.raises(ConfigurationError, match="steps=0: this model pools generated states only"):
        embedder_of("qwen2").encode(["x"], steps=0)
    with pytest.raises(ConfigurationError, match="bidirectional attention cannot generate"):
        embedder_of("qwen2", BIDIRECTIONAL_AVG).encode(["x"], steps=3)


def test_no_instruction_is_bare_and_an_instruction_is_the_template(embedder: Embedder) -> None:
    assert embedder.first_prompt("cats") == "cats"
    assert embedder.first_prompt("cats", instruction="Find it") == "Instruct: Find it\nQuery:cats"
    one = embedder.encode("cats", instruction="Find it", steps=2)
    np.testing.assert_allclose(one, embedder.encode("Instruct: Find it\nQuery:cats", steps=2), atol=2e-7)
    assert np.abs(one - embedder.encode("cats", steps=2)).max() > 0.01


def test_queries_and_documents_have_the_models_own_instructions(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("qwen2", ModelSettings(query_instruction="Find it", document_instruction="Keep it", halt=FixedSteps(2)))
    for call, own in ((embedder.encode_query, "Find it"), (embedder.encode_document, "Keep it")):
        np.testing.assert_array_equal(call(TEXTS), embedder.encode(TEXTS, instruction=own))
        np.testing.assert_array_equal(call("x", instruction="Other"), embedder.encode("x", instruction="Other"))
    bare = embedder_of("qwen2", SHORT)
    np.testing.assert_array_equal(bare.encode_document("x"), bare.encode("x"))


def test_similarity_is_the_cosine_of_every_pair(embedder: Embedder) -> None:
    queries, documents = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[4.0, 3.0], [0.0, -5.0], [1.0, 0.0]])
    expected = [[24 / 25, -4 / 5, 3 / 5], [3 / 5, -1.0, 0.0]]
    np.testing.assert_allclose(embedder.similarity(queries, documents), expected, atol=1e-7)


@pytest.mark.usefixtures("untyped_caller")
def test_similarity_takes_single_vectors_as_encode_gives_them(embedder: Embedder) -> None:
    np.testing.assert_allclose(embedder.similarity(np.array([3.0, 4.0]), np.array([4.0, 3.0])), [[24 / 25]], atol=1e-7)


def test_one_pass_models_have_no_stability(embedder_of: Callable[..., Embedder]) -> None:
    refined = embedder_of("qwen2", CAUSAL_EOS).refine(["x", "y z"])
    assert refined.steps.tolist() == [0, 0]
    assert refined.stability.shape == (2, 0)


def test_an_embedder_prints_where_it_comes_from_and_how_it_halts(folder_of: Callable[..., Any]) -> None:
    folder = folder_of("qwen2")
    assert repr(load(folder)) == f"Embedder({str(folder)!r}, dimensions={doubles.HIDDEN}, halt=FixedSteps(steps=20))"


def test_prefix_attention_and_prompt_pooling_work_from_text_to_vector(embedder_of: Callable[..., Embedder]) -> None:
    embedder = embedder_of("bert")
    assert embedder.settings.pooling == Pooling(kind="mean", prompt_weight=2.0)
    assert embedder.first_prompt("x y") == "<s>x y</s>"
    vectors = embedder.encode([*TEXTS[:3], ""], steps=4)
    for vector, text in zip(vectors, [*TEXTS[:3], ""], strict=True):
        expected = doubles.alone(embedder.backbone, embedder.tokenizer([text]).ids[0], 4)[4]
        np.testing.assert_allclose(vector, expected, atol=2e-7)


@pytest.mark.usefixtures("untyped_caller")
def test_the_class_of_a_rule_is_no_rule(embedder_of: Callable[..., Embedder]) -> None:
    with pytest.raises(ConfigurationError, match="expected a halting rule such as"):
        embedder_of("qwen2").encode(["x"], halt=FixedSteps)


def test_a_repository_name_that_cannot_be_is_refused() -> None:
    with pytest.raises(CheckpointError, match="foo/bar baz: cannot be taken from the hub; check the name"):
        load("foo/bar baz")
