"""Docstrings are read from source, and nothing of it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

import genembed.docstrings
from genembed.docstrings import docstrings, standard_library

SOURCE = '''
"""Module docstring, which belongs to nothing that can be called."""
raise SystemExit("this source must not be run")

def area(width: float, height=1.0, *, unit: str = "m", **rest) -> float:
    """Return the area.

    More:
        Indented.
    """

def undocumented(): ...
def _private():
    """Not public."""

if True:
    async def fetch(url, /): "Fetch a page."
else:
    def other(): "Of another platform."
try:
    def quick(): "Fast version."
except ImportError:
    def slow(): "Slow version."

class Shape:
    """A shape."""
    def __init__(self, name): "Not public."
    def scale(self, factor): "Make it larger."
    @classmethod
    def of(cls, *values): "Make one."
    class Part:
        "A part."
    class _Hidden:
        def shown(self): "Inside something private."

def outer():
    "Outside."
    def inner(): "Inside a function."
'''


def test_public_definitions_are_found_with_name_signature_and_line() -> None:
    found = [(item.name, item.kind, item.signature, item.line) for item in docstrings(SOURCE, "shapes")]
    assert found == [
        ("shapes.area", "function", "(width, height=1.0, *, unit='m', **rest)", 5),
        ("shapes.fetch", "function", "(url, /)", 17),
        ("shapes.other", "function", "()", 19),
        ("shapes.quick", "function", "()", 21),
        ("shapes.slow", "function", "()", 23),
        ("shapes.Shape", "class", "(name)", 25),
        ("shapes.Shape.scale", "method", "(factor)", 28),
        ("shapes.Shape.of", "method", "(*values)", 30),
        ("shapes.Shape.Part", "class", "", 31),
        ("shapes.outer", "function", "()", 36),
    ]


def test_the_text_loses_its_indentation_and_the_summary_is_its_first_paragraph() -> None:
    first = next(docstrings(SOURCE, "shapes"))
    assert first.text == "Return the area.\n\nMore:\n    Indented."
    assert first.summary == "Return the area."
    wrapped = next(docstrings('def f():\n    """One\n    sentence.\n\n    More."""', "m"))
    assert wrapped.summary == "One sentence."


def test_half_a_surrogate_pair_in_a_docstring_becomes_a_question_mark() -> None:
    assert [item.text for item in docstrings('def f(): "a\\ud800b"', "m")] == ["a?b"]


@pytest.mark.parametrize("source", ["def f(:", b"\xff\xfe", "x = '\0'", "(" * 5000])
def test_what_is_not_python_raises_syntax_error(source: str | bytes) -> None:
    with pytest.raises(SyntaxError):
        list(docstrings(source, "m"))


def test_doubtful_escapes_in_foreign_source_do_not_warn() -> None:
    assert [item.text for item in docstrings(r'def f(): "a\d"', "m")] == [r"a\d"]


def test_the_library_is_walked_without_tests_and_private_modules_and_functions_come_first(tmp_path: Path) -> None:
    for path in ("b.py", "a/__init__.py", "a/part.py", "a/_part.py", "test/t.py", "a/tests/t.py", "site-packages/s.py", "tkinter/t.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('class C:\n    "C."\n    def m(self): "M."\ndef f(): "F."\n')
    (tmp_path / "_pydatetime.py").write_text('def now(): "Now."')
    found = [item.name for item in standard_library(tmp_path)]
    assert found == ["datetime.now", "b.f", "a.f", "a.part.f", "b.C", "a.C", "a.part.C", "b.C.m", "a.C.m", "a.part.C.m"]


def test_the_reading_of_the_library_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_text('def f(): "F."')
    bar = genembed.docstrings.tqdm
    monkeypatch.setattr(genembed.docstrings, "tqdm", lambda items, **options: bar(items, **options | {"delay": 0, "mininterval": 0}))
    standard_library(tmp_path)
    assert capsys.readouterr().err == ""
    standard_library(tmp_path, show_progress_bar=True)
    assert "reading: 100%" in capsys.readouterr().err


def test_the_running_library_has_thousands_of_docstrings_each_name_once() -> None:
    found = standard_library()
    names = {item.name for item in found}
    assert len(names) == len(found) > 3000
    assert names > {"shutil.copytree", "threading.Barrier", "argparse.ArgumentParser", "queue.PriorityQueue", "datetime.timedelta"}
