"""What the package promises to those who install it: how fast it imports, what it asks of the network, what distribution/check.py reads."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "distribution" / "check.py"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_light_public_names_import_within_1_5_seconds_beyond_torch() -> None:
    """Seconds of the processor, which other work on the machine does not stretch as it does those of the clock."""
    names = "Budget, ConvergeStop, FixedSteps, HaltingRule, ModelSettings, Pooling, Progress"
    code = f"import time, torch; begin = time.process_time(); from genembed import {names}; print(time.process_time() - begin)"
    assert float(python(code)) < 1.5


def test_offline_asks_nothing_of_the_network_not_even_a_socket(folder_of: Callable[[str], Path]) -> None:
    code = f"""
import socket

def refused(*arguments, **options):
    raise AssertionError(f"a socket was asked for: {{arguments}}")

socket.socket.__init__ = socket.getaddrinfo = socket.create_connection = refused
import genembed
vectors = genembed.load({str(folder_of("bert"))!r}, offline=True).encode(["a text"], steps=1)
try:
    genembed.load("owner/name", preset="gircse", offline=True)
except genembed.CheckpointError as error:
    print(vectors.shape, "not found in the local cache" in str(error))
"""
    assert python(code) == "(1, 32) True\n"


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    if not SCRIPT.is_file():
        pytest.skip("distribution/ is not here: it comes with the repository, not with the package")
    found = python("import sys; sys.path.insert(0, 'distribution'); import check; print(*check.lowest())").split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {one.replace("==", ">=") for one in found} >= {re.split(r"[,;]", one)[0] for one in project["dependencies"]}
