"""Prompt templates."""

from __future__ import annotations

import pytest

from genembed import ConfigurationError
from genembed.prompt import GIRCSE_TEMPLATE, LASER_TEMPLATE, PromptTemplate


def test_the_published_templates_differ_by_one_space() -> None:
    assert PromptTemplate(GIRCSE_TEMPLATE).apply("cats", "Find it") == "Instruct: Find it\nQuery:cats"
    assert PromptTemplate(LASER_TEMPLATE).apply("cats", "Find it") == "Instruct: Find it\nQuery: cats"


def test_without_an_instruction_a_text_is_read_bare() -> None:
    assert PromptTemplate(GIRCSE_TEMPLATE).apply("cats", None) == "cats"
    assert PromptTemplate(GIRCSE_TEMPLATE).around(None) == ("", "")


def test_an_empty_instruction_is_an_instruction() -> None:
    assert PromptTemplate(GIRCSE_TEMPLATE).apply("cats", "") == "Instruct: \nQuery:cats"


def test_braces_in_instruction_and_text_are_kept() -> None:
    """str.format would fail on them, or fill the text into the instruction."""
    template = PromptTemplate("{instruction}|{text}|end")
    assert template.apply("{text} {0}", "write {text} as {json}") == "write {text} as {json}|{text} {0}|end"
    json = PromptTemplate('{"task": "{instruction}", "text": "{text}"}')
    assert json.apply("cats", "Find it") == '{"task": "Find it", "text": "cats"}'


@pytest.mark.parametrize("template", ["{text}", "{instruction}", "{text} {instruction}", "{instruction}{text}{text}", "", "Query: "])
def test_a_template_without_both_fields_in_order_is_refused(template: str) -> None:
    with pytest.raises(ConfigurationError, match=r"it must hold \{instruction\} and then \{text\}, each exactly once"):
        PromptTemplate(template)
