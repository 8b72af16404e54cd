"""Check what a user gets: wheel and sdist, a clean environment, each extra, the types seen from outside.

    python distribution/check.py                      # some minutes, and the package index
    python distribution/check.py --matrix             # also the short tests, with the lowest and the newest versions, on every Python here
    python distribution/check.py --only wheel types   # parts by name

Everything is made in a temporary folder; the last lines are a table of what held.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [name for name in PROJECT["optional-dependencies"] if name not in ("dev", "docs", "benchmarks")]
PYTHONS = ("3.11", "3.12", "3.13")

SHORT_TESTS = [
    *("laws", "test_backbone.py", "test_checkpoint.py", "test_embedder.py", "test_engine.py", "test_halting.py", "test_pooling.py"),
    *(
        "test_precision.py",
        "test_prompt.py",
        "test_public_names.py",
        "test_settings.py",
        "test_soft_token.py",
        "test_tokens.py",
        "test_cli.py",
    ),
]
TEST_TOOLS = ("pytest", "hypothesis", "beartype", "httpx")
"""What the short tests need beside the extras demo and calibrate."""

USER_FILE = """
import numpy as np

import genembed
from genembed import ConvergeStop, Embedder, FixedSteps, Refinement

def nearest(model: Embedder, query: str, documents: list[str]) -> int:
    result: Refinement = model.refine([query], halt=ConvergeStop(threshold=0.999))
    vectors: np.ndarray = model.encode_document(documents, steps=5)
    return int(model.similarity(result.vectors, vectors).argmax())

nearest(genembed.load("mini", offline=True), "a question", ["a text"])
model = genembed.load("mini", preset=FixedSteps(3))
"""
WRONG_LINE = "preset"
"""What mypy has to find in the last line, which is wrong; and nothing else."""


class CheckError(Exception):
    """A part that does not hold; the message says what was seen."""


@dataclass
class Clean:
    """A clean environment, and the folder it is in."""

    folder: Path
    wheel: Path

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "clean" / "bin" / "python")

    def requirement(self, *extras: str) -> str:
        """Return the wheel with these extras, as pip takes it."""
        return f"genembed[{','.join(extras)}] @ {self.wheel.as_uri()}"


def ran(*command: str, cwd: Path, allowed: Sequence[int] = (0,)) -> str:
    """Run a command without our environment's paths; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    if done.returncode not in allowed:
        raise CheckError(f"{' '.join(command)[:100]}: {(done.stdout + done.stderr).strip()[-1200:]}")
    return done.stdout


def build(folder: Path) -> Path:
    """Build the sdist, and the wheel from it; return the wheel."""
    venv.create(folder / "builder", with_pip=True)
    python = str(folder / "builder" / "bin" / "python")
    ran(python, "-m", "pip", "install", "--quiet", "build", cwd=folder)
    ran(python, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT), cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def check_wheel(clean: Clean) -> str:
    """The wheel has every file of the package that git knows, the mark of its types, and nothing else."""
    inside = {name for name in zipfile.ZipFile(clean.wheel).namelist() if ".dist-info/" not in name}
    tracked = set(ran("git", "ls-files", "genembed", cwd=ROOT).split())
    if inside != tracked or "genembed/py.typed" not in inside:
        raise CheckError(f"only in the wheel: {sorted(inside - tracked)[:5]}; only in git: {sorted(tracked - inside)[:5]}")
    return f"{len(inside)} files, {clean.wheel.stat().st_size / 1e6:.1f} MB"


def check_install(clean: Clean) -> str:
    """The wheel installs with [demo] into an empty environment whose packages agree with one another."""
    venv.create(clean.folder / "clean", with_pip=True)
    begin = time.perf_counter()
    ran(clean.python, "-m", "pip", "install", "--quiet", clean.requirement("demo"), cwd=clean.folder)
    ran(clean.python, "-m", "pip", "check", cwd=clean.folder)
    packages = ran(clean.python, "-m", "pip", "list", "--format=freeze", cwd=clean.folder).splitlines()
    return f"{len(packages)} packages, {time.perf_counter() - begin:.0f} s"


def check_six_lines(clean: Clean) -> str:
    """README's six lines print what README shows."""
    code, shown = re.findall(r"```(?:python|text)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[:2]
    printed = ran(clean.python, "-I", "-c", code, cwd=clean.folder)
    if printed.split() != shown.split():
        raise CheckError(f"printed {printed!r}, shown {shown!r}")
    return printed.strip()


def check_demo(clean: Clean) -> str:
    """`genembed demo` answers its questions."""
    command = str(clean.folder / "clean" / "bin" / "genembed")
    printed = ran(command, "demo", "--rows", "50", "--index", str(clean.folder / "index"), cwd=clean.folder)
    if "50 docstrings of Python" not in printed:
        raise CheckError(printed)
    return "50 docstrings searched"


def check_types(clean: Clean) -> str:
    """mypy, from outside, takes what is right and finds what is wrong."""
    ran(clean.python, "-m", "pip", "install", "--quiet", "mypy", cwd=clean.folder)
    user = clean.folder / "user.py"
    user.write_text(USER_FILE)
    found = ran(clean.python, "-m", "mypy", "--strict", str(user), cwd=clean.folder, allowed=(1,))
    errors = [line for line in found.splitlines() if ": error: " in line]
    if len(errors) != 1 or WRONG_LINE not in errors[0]:
        raise CheckError(found)
    return "one wrong line, one error"


def check_extras(clean: Clean) -> str:
    """Each extra resolves alone, and all of them together."""
    for name in EXTRAS:
        ran(clean.python, "-m", "pip", "install", "--quiet", "--dry-run", clean.requirement(name), cwd=clean.folder)
    return f"{', '.join(EXTRAS)}: each alone"


PARTS: dict[str, Callable[[Clean], str]] = {
    "wheel": check_wheel,
    "install": check_install,
    "six-lines": check_six_lines,
    "demo": check_demo,
    "types": check_types,
    "extras": check_extras,
}


def lowest() -> list[str]:
    """Return every requirement at the lowest version that pyproject allows."""
    everything = [*PROJECT["dependencies"], *(one for name in EXTRAS for one in PROJECT["optional-dependencies"][name])]
    found = [re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", one) for one in everything if not one.startswith("genembed[")]
    return sorted({f"{one[1]}=={one[2]}" for one in found if one})


def check_matrix(clean: Clean, python: str, versions: str) -> str:
    """The short tests pass with this Python and these versions."""
    home = clean.folder / versions
    ran(python, "-m", "venv", str(home), cwd=clean.folder)
    pins = clean.folder / "lowest.txt"
    pins.write_text("\n".join(lowest()) + "\n")
    own = str(home / "bin" / "python")
    bound = ["--constraint", str(pins)] if versions == "lowest" else []
    ran(own, "-m", "pip", "install", "--quiet", *bound, clean.requirement("demo", "calibrate", "jobs"), *TEST_TOOLS, cwd=clean.folder)
    # A copy of the tests, beside the installed package: that of the checkout must not be the one that is imported.
    tests, package = clean.folder / "tests", clean.folder / "genembed"
    if not tests.exists():
        shutil.copytree(ROOT / "tests", tests)
        shutil.copy(ROOT / "pyproject.toml", clean.folder)
    package.unlink(missing_ok=True)
    package.symlink_to(next(home.glob("lib/python*/site-packages/genembed")))
    chosen = [str(tests / name) for name in SHORT_TESTS]
    said = ran(
        own,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=-q -m 'not slow and not gpu and not network'",
        *chosen,
        cwd=clean.folder,
    )
    shutil.rmtree(home)
    return said.strip().splitlines()[-1]


def pythons() -> Iterator[str]:
    """Yield the interpreters of the supported versions that are here."""
    for version in PYTHONS:
        installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        found = shutil.which(f"python{version}") or (str(installed[-1]) if installed else None)
        if found is not None and subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            yield found


def report(name: str, check: Callable[[], str]) -> bool:
    """Run a part, print its line of the table; return whether it held."""
    try:
        said, held = check(), True
    except CheckError as error:
        said, held = str(error), False
    print(f"{name:<32}{'holds' if held else 'FAILS':<8}{said}", flush=True)
    return held


def main(arguments: Any = None) -> int:
    """Run the parts; return 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", action="store_true", help="the short tests with lowest and newest versions, on every Python here")
    parser.add_argument(
        "--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="parts to run; six-lines and the others need install"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        clean = Clean(folder, build(folder))
        held = [report(name, lambda name=name: PARTS[name](clean)) for name in PARTS if name in given.only]  # type: ignore[misc]
        if given.matrix:
            for python in pythons():
                for versions in ("lowest", "newest"):
                    name = f"{versions}, {Path(python).resolve().parts[-3]}"
                    held.append(report(name, lambda python=python, versions=versions: check_matrix(clean, python, versions)))  # type: ignore[misc]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
