"""What the site is made of besides its pages: the command line's own help, the docstrings, the card of `mini`, the notebook.

MkDocs calls the functions named `on_...`. Pages are written for readers of the repository too: what only the site needs is done here.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import genembed
from genembed import cli

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "genembed" / "builtin" / "mini" / "README.md"
NOTEBOOK = ROOT / "docs" / "tour.ipynb"

_ERROR = re.compile("Error$|Warning$")

API = {
    "Public names": [
        f"genembed.{name}" for name in sorted(genembed.__all__, key=lambda name: (_ERROR.search(name) is not None, name.lower()))
    ],
    "Halting rules": ["genembed.halting", "genembed.index.rank_stop"],
    "The reference loop": ["genembed.refine", "genembed.soft_token", "genembed.pooling"],
    "Model settings": ["genembed.settings", "genembed.precision"],
    "Training": ["genembed.train.recipe", "genembed.train.losses", "genembed.train.run"],
    "Calibration": ["genembed.calibrate.choose", "genembed.calibrate.betting", "genembed.calibrate.certificate"],
    "Evaluation": ["genembed.evaluate.encoder", "genembed.evaluate.run", "genembed.evaluate.two_stage"],
    "The index": ["genembed.index"],
    "Corpus jobs": ["genembed.jobs.run", "genembed.jobs.model", "genembed.jobs.status"],
    "The server": ["genembed.serve.run", "genembed.serve.limits"],
    "Export": ["genembed.export.merged", "genembed.export.onnx_embedder"],
    "Integrations": [
        "genembed.integrations.sentence_transformers",
        "genembed.integrations.langchain",
        "genembed.integrations.llama_index",
        "genembed.integrations.haystack",
        "genembed.integrations.lancedb",
    ],
}
"""Pages of the reference, and what stands on each: whole modules, or names of them."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages where the navigation names them."""
    sections = {
        "cli": [{"All verbs": "cli/index.md"}, *({verb: f"cli/genembed-{verb}.md"} for verb in _verbs())],
        "api": [{title: f"api/{_slug(title)}.md"} for title in API],
    }
    config.nav = _filled(config.nav, sections)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"mini.md": _card(), "tour.md": _tour(), **_cli_pages()}
    for title, names in API.items():
        pages[f"api/{_slug(title)}.md"] = f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    for place, picture in _outputs():
        files.append(File.generated(config, place, content=picture))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make what is written for the repository right for the site: links that leave docs/, and fences that say what they do in tests."""
    folder = posixpath.dirname(page.file.src_uri)
    here = "docs" if page.file.src_uri != "mini.md" else CARD.parent.relative_to(ROOT).as_posix()

    def link(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(here, folder, found[1]))
        if place.startswith("docs/"):
            return f"]({posixpath.relpath(place[5:], folder or '.')}{found[2] or ''})"
        return f"]({config.extra['repository']}/{place}{found[2] or ''})"

    shown = re.sub(r"^(```\w+) no-run$", r"\1", markdown, flags=re.MULTILINE)
    return re.sub(r"\]\((\.\./[^)#]*)(#[^)]*)?\)", link, shown)


def _filled(nav: Any, sections: dict[str, Any]) -> Any:
    """Replace the names of sections by the sections."""
    if isinstance(nav, list):
        return [_filled(item, sections) for item in nav]
    if isinstance(nav, dict):
        return {title: _filled(item, sections) for title, item in nav.items()}
    return sections.get(nav, nav)


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _verbs() -> dict[str, Any]:
    return dict(cli.typer.main.get_command(cli.app).commands)


def _cli_pages() -> dict[str, str]:
    """Return a page for each verb, and one that lists them, made of what `--help` is made of."""
    rows = [f"| [`genembed {name}`](genembed-{name}.md) | {_first(command)} |" for name, command in _verbs().items()]
    about = "Results go to stdout, progress and errors to stderr. A mistake ends in one line and exit code 2.\n\nThese pages are made from"
    intro = f"# Command line\n\n{about} the commands themselves; `genembed VERB --help` says the same.\n\n| | |\n|---|---|\n"
    pages = {"cli/index.md": intro + "\n".join(rows) + "\n"}
    for name, command in _verbs().items():
        pages[f"cli/genembed-{name}.md"] = "\n".join(_command_page(command, f"genembed {name}", 1))
    return pages


def _command_page(command: Any, path: str, level: int) -> Iterator[str]:
    """Yield the lines of a command: its help, usage, arguments and options, and then its own commands."""
    context = command.context_class(command, info_name=path)
    yield f"{'#' * level} {path}\n"
    yield f"{command.help or ''}\n"
    yield f"```text\n{' '.join(command.get_usage(context).removeprefix('Usage: ').split())}\n```\n"
    records = [(parameter, parameter.get_help_record(context)) for parameter in command.get_params(context) if parameter.name != "help"]
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        rows = [record for parameter, record in records if parameter.param_type_name == kind and record]
        if rows:
            yield f"{'#' * (level + 1)} {title}\n\n| | |\n|---|---|"
            yield "\n".join(f"| `{_cell(names)}` | {_cell(text)} |" for names, text in rows) + "\n"
    for name, part in getattr(command, "commands", {}).items():
        yield from _command_page(part, f"{path} {name}", level + 1)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first(command: Any) -> str:
    return _cell((command.help or "").split("\n\n")[0])


def _card() -> str:
    """Return the model card without the lines that are for the hub."""
    return CARD.read_text(encoding="utf-8").partition("\n---\n")[2].lstrip()


def _cells() -> list[dict[str, Any]]:
    return list(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])


def _tour() -> str:
    """Return the notebook as a page: texts, code, and what it printed."""
    parts: list[str] = []
    for number, cell in enumerate(_cells()):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            printed = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            picture = "image/png" in output.get("data", {})
            parts.append(f"![{_alt(cell)}](tour/{number}.png)" if picture else f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _alt(cell: dict[str, Any]) -> str:
    """Return what a cell's picture shows: its first line, a comment."""
    return str(cell["source"][0]).removeprefix("#").strip()


def _outputs() -> Iterator[tuple[str, bytes]]:
    """Yield the pictures of the notebook with their places on the site."""
    import base64

    for number, cell in enumerate(_cells()):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield f"tour/{number}.png", base64.b64decode("".join(output["data"]["image/png"]))
