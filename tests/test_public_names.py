"""The public surface is a tested list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import genembed


def test_the_public_names_are_sorted_and_are_all_that_a_type_checker_sees() -> None:
    tree = ast.parse(Path(genembed.__file__).read_text(encoding="utf-8"))
    seen = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    seen = [name for name in seen if name[0].isupper() or name == "load"]
    assert genembed.__all__ == sorted(set(seen) - {"TYPE_CHECKING"})


def test_every_public_name_is_there_and_no_other() -> None:
    assert [name for name in genembed.__all__ if getattr(genembed, name).__name__ != name] == []
    with pytest.raises(AttributeError, match="module 'genembed' has no attribute 'Engine'"):
        genembed.Engine  # noqa: B018


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in genembed.__all__ if not getattr(genembed, name).__doc__] == []


def test_every_error_is_a_genembed_error_and_the_builtin_one_it_stands_for() -> None:
    kinds = {
        genembed.CheckpointError: ValueError,
        genembed.ConfigurationError: ValueError,
        genembed.InputError: ValueError,
        genembed.MissingExtraError: ImportError,
        genembed.NonFiniteError: ArithmeticError,
        genembed.OutOfMemoryError: MemoryError,
    }
    assert {name for name in genembed.__all__ if name.endswith("Error")} == {"GenembedError", *(kind.__name__ for kind in kinds)}
    for kind, builtin in kinds.items():
        assert issubclass(kind, genembed.GenembedError)
        assert issubclass(kind, builtin)


def test_a_missing_extra_says_the_command_that_installs_it() -> None:
    from genembed.errors import missing_extra

    error = missing_extra("index", "lancedb")
    assert str(error) == "lancedb is not installed: this needs the extra 'index'. Install it with: pip install 'genembed[index]'"
