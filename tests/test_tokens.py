"""From prompted text to token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import doubles
from genembed import CheckpointError, ConfigurationError, InputError
from genembed.tokens import PromptTokenizer, TokenBatch, Tokenised, common_prefix

BOTH = ((doubles.BOS,), (doubles.EOS,))
TEXT = "A language model refines the vector of a text."


def made(**settings: Any) -> PromptTokenizer:
    return PromptTokenizer(doubles.tokenizer(), doubles.settings_of("qwen2", **settings))


def bare(text: str) -> list[int]:
    return doubles.tokenizer()(text, add_special_tokens=False)["input_ids"]


def ids_of(tokenised: Tokenised) -> list[list[int]]:
    return [ids.tolist() for ids in tokenised.ids]


def test_without_special_tokens_the_ids_are_those_of_the_text() -> None:
    assert ids_of(made()([TEXT, "x"])) == [bare(TEXT), bare("x")]


def test_named_special_tokens_stand_before_and_after() -> None:
    assert ids_of(made(special_tokens=BOTH)([TEXT])) == [[0, *bare(TEXT), 1]]


def test_the_tokenizers_own_special_tokens_are_read_off_it() -> None:
    assert ids_of(made(special_tokens="tokenizer")([TEXT])) == [doubles.tokenizer()(TEXT)["input_ids"]]


def test_instruction_and_text_are_tokenised_as_one_string() -> None:
    assert ids_of(made()(["cats"], "Find it")) == [bare("Instruct: Find it\nQuery:cats")]


def test_a_special_token_the_vocabulary_lacks_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"special token '\[CLS\]' is not in this tokenizer's vocabulary"):
        made(special_tokens=(("[CLS]",), ()))


def test_the_unknown_token_itself_may_be_named() -> None:
    assert ids_of(made(special_tokens=((doubles.UNKNOWN,), ()))(["x"])) == [[2, *bare("x")]]


@given(words=st.integers(1, 60), max_length=st.integers(1, 40))
@examples(max_examples=60)
def test_a_text_is_cut_from_the_right_and_flagged_when_it_does_not_fit(words: int, max_length: int) -> None:
    whole = bare("token " * words)
    tokenised = made(max_length=max_length)(["token " * words])
    assert ids_of(tokenised) == [whole[:max_length]]
    assert tokenised.truncated.tolist() == [len(whole) > max_length]
    assert tokenised.tokens.tolist() == [min(len(whole), max_length)]
    assert tokenised.longest == len(whole)


def test_special_tokens_and_the_templates_tail_survive_the_cut() -> None:
    tokenizer = made(special_tokens=BOTH, max_length=20, template="{instruction}: {text} ->")
    tokenised = tokenizer(["token " * 50, "x"], "Find")
    body, tail = bare("Find: " + "token " * 50), bare(" ->")
    assert ids_of(tokenised) == [[0, *body[: 20 - 2 - len(tail)], *tail, 1], [0, *bare("Find: x"), *tail, 1]]
    assert tokenised.truncated.tolist() == [True, False]
    assert tokenised.longest == len(body) + len(tail) + 2


@pytest.mark.parametrize("texts", [["a text", "another"], ["7 of them"], ["- a list", " a space"]])
def test_what_the_template_fixes_is_what_prompts_of_any_text_share(texts: list[str]) -> None:
    tokenised = made(special_tokens=BOTH)(texts, "Find what answers the question")
    fixed = [0, *bare("Instruct: Find what answers the question\nQuery:x")][: tokenised.shared]
    assert tokenised.shared >= 5
    assert [ids[: tokenised.shared - 1] for ids in ids_of(tokenised)] == [fixed[:-1]] * len(texts)
    assert made(special_tokens=BOTH)(texts).shared == 1


def test_an_instruction_that_fills_the_model_is_refused() -> None:
    """Otherwise every text would be cut to nothing, and all of them would get the same vector."""
    with pytest.raises(InputError, match=r"the instruction leaves no room for a text: max_length is 16 tokens; shorten the instruction"):
        made(max_length=16)(["one text", "another text"], "Find " * 40)


def test_a_tail_that_fills_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="leaves no room for a text"):
        made(max_length=4, template="{instruction}{text} and a long tail of many tokens")(["x"], "")


def test_special_tokens_that_fill_the_model_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_length=2 leaves no room for a text beside 2 special tokens"):
        made(max_length=2, special_tokens=BOTH)


def test_a_text_without_tokens_is_refused_by_row_and_welcome_beside_special_tokens() -> None:
    with pytest.raises(InputError, match=r"row 11: the text '' has no tokens.*drop it or .*instruction"):
        made()(["x", ""], first_row=10)
    assert ids_of(made()([""], "Find")) == [bare("Instruct: Find\nQuery:")]
    assert ids_of(made(special_tokens=BOTH)([""])) == [[0, 1]]


def test_no_texts_give_no_ids() -> None:
    tokenised = made()([])
    assert (tokenised.ids, tokenised.tokens.tolist(), tokenised.truncated.tolist(), tokenised.longest) == ([], [], [], 0)


@pytest.mark.usefixtures("untyped_caller")
@pytest.mark.parametrize(("value", "name"), [(3, "int"), (None, "NoneType"), (b"x", "bytes"), (["x"], "list")])
def test_what_is_not_a_string_is_refused_by_row(value: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"row 6: expected a string, got {name}"):
        made()(["x", value], first_row=5)


def test_a_lone_surrogate_is_refused_by_row_and_character_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"row 1: character 2 is a lone surrogate \('\\ud83d'\).*text\.encode\('utf-8', 'replace'\)"):
        made()(["fine 🙂", "ab\ud83dc"])


@pytest.mark.parametrize("text", ["\0", "\0\0x", " ", "\n\t ", "\ufeff", "\u202eright to left", "é" * 3, "🙂", "﷽", "\x1b[31m"])
def test_odd_characters_have_tokens_that_decode_to_them(text: str) -> None:
    ids = made()([text]).ids[0]
    assert doubles.tokenizer().decode(ids) == text


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_hides_what_it_adds_and_positions_do_not_count_it(side: Any) -> None:
    batch = TokenBatch.pad([np.array([5, 6, 7]), np.array([8])], side=side, index=[4, 2])
    ids, mask, positions = ([8, 0, 0], [True, False, False], [0, 0, 0]) if side == "right" else ([0, 0, 8], [False, False, True], [0, 0, 0])
    assert batch.input_ids.tolist() == [[5, 6, 7], ids]
    assert batch.mask.tolist() == [[True, True, True], mask]
    assert batch.positions.tolist() == [[0, 1, 2], positions]
    assert batch.index.tolist() == [4, 2]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
@examples(max_examples=150)
def test_the_common_prefix_is_shared_by_all_and_leaves_each_prompt_a_token(prompts: list[list[int]]) -> None:
    shared = common_prefix([np.array(ids) for ids in prompts])
    assert all(ids[:shared] == prompts[0][:shared] and len(ids) > shared for ids in prompts)
    longer = shared + 1
    assert any(ids[:longer] != prompts[0][:longer] or len(ids) <= longer for ids in prompts)


def test_a_wrong_shape_is_found_by_the_checks_of_the_test_run() -> None:
    """Guards the import hook: without it, no shape in a signature is checked by any test."""
    from jaxtyping import TypeCheckError

    from genembed.soft_token import soft_token

    with pytest.raises(TypeCheckError):
        soft_token(torch.zeros(2, 5), torch.zeros(4, 3))


def test_an_instruction_that_is_not_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"the instruction is not valid Unicode \(a lone surrogate at character 2\)"):
        made()(["x"], "ab\udcff")


@pytest.mark.usefixtures("untyped_caller")
def test_an_instruction_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="instruction: expected a string, got int: 3"):
        made()(["x"], 3)  # type: ignore[arg-type]


def test_many_texts_are_tokenised_as_one_by_one() -> None:
    """They are tokenised in slices."""
    texts = [f"text {number}" for number in range(600)]
    together = made()(texts)
    assert [ids.tolist() for ids in together.ids] == [made()([text]).ids[0].tolist() for text in texts]


class PanicException(BaseException):
    """As the tokenizers library raises for a damaged file: no `Exception`, and of a class that cannot be imported."""


def test_a_panic_of_the_tokenizers_library_is_an_error_of_the_folder_and_an_interrupt_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made()
    for raised, expected in ((PanicException("range end index 10"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def breaks(*_: Any, raised: BaseException = raised, **__: Any) -> None:
            raise raised

        monkeypatch.setattr(tokenizer, "tokenizer", breaks)
        with pytest.raises(expected):
            tokenizer([TEXT])
