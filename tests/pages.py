"""Pages of documentation as tests: their blocks run in order in one folder, and print what the page shows.

    python tests/pages.py docs/tutorial.md

runs a page in an empty folder and writes what its blocks print into it. What runs:

- `python`: all blocks of a page share their names;
- `bash` and `sh`: through bash; `console`: the lines after `$ `, each with the output that the page shows under it;
- `genembed serve` is started in the background on a free port, and stopped at the end of the page;
- `pip install` is not run (packaging/check.py does): the extras it names have to exist.

A `text` block right after a block that runs is what that printed. A block that says `no-run` after its kind does not run; the line
before it says why.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RUNNABLE = ("python", "bash", "sh", "console")
PORT = "8080"
"""The port that pages name; where they run it is a free one."""

_FENCE = re.compile(r"^```([\w-]*)( no-run)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[-+]\d+)?")
_TIME = re.compile(
    r"(?:\d[\d.,]* to )?\d[\d.,]*(?= (?:s|ms)\b)|\(\d[\d.,]* a second\)|\d+% of the time|\d+ min \d+ s|[\d.,]+ (?:rows|tokens)/s"
)
"""What no two runs agree on."""
_LIBRARY = re.compile(r"docstrings of Python (\d+\.\d+)")
"""What `genembed demo` searches: other texts in every version of Python."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    no_run: bool
    text: str
    span: tuple[int, int]
    """Where its text stands in the page."""
    before: str
    """The last line of text before it."""
    follows: bool
    """Whether nothing but an empty line is between it and the block before."""

    @property
    def runs(self) -> bool:
        return self.kind in RUNNABLE and not self.no_run


@dataclass
class Printed:
    """What a part of a page printed, and what the page shows there."""

    page: Path
    span: tuple[int, int]
    shown: str
    printed: str

    def check(self) -> None:
        """Compare the words exactly, the numbers to half a hundredth or one in a hundred, and times not at all."""
        if not self.shown.strip():
            return
        library = _LIBRARY.search(self.shown)
        if library and library[1] != "%d.%d" % sys.version_info[:2]:  # noqa: UP031  (a version, not a sentence)
            assert self.printed.splitlines()[0] == self.shown.splitlines()[0]
            return
        given, expected = (_TIME.sub("TIME", _lines(text)) for text in (self.printed, self.shown))
        assert _NUMBER.sub("#", given) == _NUMBER.sub("#", expected), f"{self.page.name} shows\n{self.shown}\nand its block prints\n{given}"
        numbers = [np.array([float(one.replace(",", "")) for one in _NUMBER.findall(text)]) for text in (given, expected)]
        np.testing.assert_allclose(*numbers, atol=0.0051, rtol=0.01, err_msg=f"{self.page.name} shows\n{self.shown}")


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text, end, found = page.read_text(encoding="utf-8"), 0, []
    for match in _FENCE.finditer(text):
        between = text[end : match.start()].strip()
        last = between.splitlines()[-1] if between else ""
        found.append(Block(match[1], bool(match[2]), match[3], match.span(3), last, not between and end > 0))
        end = match.end()
    return found


@dataclass
class Runner:
    """Runs the blocks of a page in the current folder."""

    page: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    port: str = field(default_factory=lambda: str(_free_port()))
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self) -> Iterator[Printed]:
        """Yield what is to be compared, in the order of the page; servers end with it."""
        printed: str | None = None
        try:
            for block in blocks(self.page):
                if block.kind == "text" and block.follows and printed is not None:
                    yield Printed(self.page, block.span, block.text, printed)
                if block.kind == "console" and block.runs:
                    yield from self._console(block)
                printed = self._printed(block) if block.runs and block.kind != "console" else None
        finally:
            for server in self.servers:
                server.terminate()
                server.communicate(timeout=60)

    def _printed(self, block: Block) -> str:
        code = block.text.replace(PORT, self.port)
        if block.kind != "python":
            return self._bash(code)
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of frameworks' own imports
            exec(compile(code, str(self.page), "exec", dont_inherit=True), self.names)  # our own file
        return stream.getvalue().replace(self.port, PORT)

    def _console(self, block: Block) -> Iterator[Printed]:
        start = block.span[0]
        for part in re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE):
            command, shown = _command(part)
            if command:
                end = start + len(part)
                printed = self._bash(command.replace(PORT, self.port))
                yield Printed(self.page, (end - len(shown), end), shown, printed)
            start += len(part)

    def _bash(self, code: str) -> str:
        kept = "\n".join(line for line in code.splitlines() if not line.startswith("pip install") or _check_extras(line))
        lines = kept.strip().splitlines()
        if lines and lines[-1].startswith("genembed serve"):
            self._serve(lines[-1])
            lines.pop()
        environment = {**os.environ, "PATH": _path(), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "COLUMNS": "100"}
        done = subprocess.run(["bash", "-ec", "\n".join(lines)], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"{self.page.name}: {code}\n{done.stderr}"
        return done.stdout.replace(self.port, PORT)

    def _serve(self, line: str) -> None:
        command = [sys.executable, "-m", "genembed.cli", *line.split()[1:]]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        self.servers.append(server)
        said = server.stderr.readline() if server.stderr is not None else ""
        assert self.port in said, f"{self.page.name}: {line}\n{said}"


def _command(part: str) -> tuple[str, str]:
    """Split what a console shows into the command, with its further lines after `> `, and the output."""
    if not part.startswith("$ "):
        return "", part
    lines = part.splitlines(keepends=True)
    count = 1
    while count < len(lines) and lines[count].startswith("> "):
        count += 1
    return "".join(line[2:] for line in lines[:count]), "".join(lines[count:])


def _check_extras(line: str) -> bool:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name in ",".join(re.findall(r"\[([\w,-]+)\]", line)).split(","):
        assert not name or name in known, f"{line}: there is no extra {name!r}"
    return False


def _path() -> str:
    return os.pathsep.join([str(Path(sys.prefix) / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])


def _lines(text: str) -> str:
    """Return the lines without the blanks at their ends, which no page keeps."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(page: Path) -> None:
    """Write what the blocks of a page print into the page."""
    page = page.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        results = list(Runner(page).run())
    text = page.read_text(encoding="utf-8")
    for one in reversed(results):
        text = text[: one.span[0]] + "".join(f"{line}\n" for line in _lines(one.printed).splitlines()) + text[one.span[1] :]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
