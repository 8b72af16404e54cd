"""Take the picture of the explorer that README shows: `mini`, and the docstrings of Python's modules about files.

    python docs/screenshot.py [-o docs/explorer.png]

It needs Debian's chromium and the extra `dev`. The same text is read under two instructions.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import genembed
from genembed.docstrings import docstrings
from genembed.index import Index, Passage, docstring_passage
from genembed.serve.app import create_app
from genembed.serve.limits import Limits
from genembed.serve.service import Service

MODULES = ("shutil", "os", "tempfile", "pathlib", "zipfile", "tarfile", "filecmp", "glob", "fileinput")
TEXT = "how do I duplicate a folder with all its files?"
INSTRUCTIONS = ("Find the function that does this.", "Which feeling does this express?")
STEPS = 6
SIZE = {"width": 1280, "height": 900}
COLOURS = 128
"""Enough for a page of text and flat colours, and a third of the bytes."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def passages() -> Iterator[Passage]:
    """Yield the docstrings, each under its name alone: where they lie on this machine is nobody's business."""
    for module in MODULES:
        source = Path(str(import_module(module).__file__)).read_bytes()
        yield from (docstring_passage(one, one.name) for one in docstrings(source, module))


@contextmanager
def served(index_folder: Path) -> Iterator[str]:
    """Serve `mini` with an index, and yield the address."""
    embedder = genembed.load("mini")
    index = Index.build(index_folder, embedder, list(passages()))
    service = Service(embedder, name="mini", limits=Limits())
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(service, index=index), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def take(address: str, output: Path) -> None:
    """Fill in the form as a person would, and save what is seen."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), headless=True, args=FLAGS)
        page = browser.new_page(viewport=SIZE, color_scheme="light", reduced_motion="reduce")
        page.goto(address)
        expect(page.locator("footer")).to_contain_text("mini")
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.get_by_label("Compare with a second reading").check()
        for place, instruction in enumerate(INSTRUCTIONS):
            page.get_by_label("Instruction").nth(place).fill(instruction)
        page.get_by_label("Steps").fill(str(STEPS))
        page.keyboard.press("Control+Enter")
        expect(page.get_by_role("status")).to_contain_text("Done", timeout=60_000)
        page.get_by_label("Steps").blur()
        seen = Image.open(BytesIO(page.screenshot(full_page=True)))
        seen.quantize(COLOURS, dither=Image.Dither.NONE).save(output, optimize=True)
        browser.close()


def main() -> None:
    """Read the command line and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("explorer.png"))
    output = parser.parse_args().output
    if shutil.which("chromium") is None:
        parser.error("there is no browser: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "index") as address:
        take(address, output)


if __name__ == "__main__":
    main()
