"""Docstrings read from source text with `ast`; nothing is imported and nothing is run."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

Kind = Literal["function", "class", "method"]

_SKIPPED_FOLDERS = ("test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip", "pydoc_data")
_SKIPPED_MODULES = ("tkinter", "turtle", "distutils")
"""Hundreds of docstrings about windows, drawing and a module that has left the library would crowd out the rest."""
_PYTHON_SOURCE_OF = {"_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io"}
"""Public modules whose Python source lies in a private file."""


@dataclass(frozen=True, kw_only=True)
class Docstring:
    """A public function, class or method, and what its author says about it."""

    name: str
    """Qualified name, such as `shutil.copytree`."""
    kind: Kind
    signature: str
    """Parameters in parentheses, as in the source but without annotations; a class has those of its `__init__`."""
    text: str
    """The docstring, its indentation removed."""
    line: int
    """Line of the definition in its file, from 1."""

    @property
    def summary(self) -> str:
        """First paragraph of the docstring, on one line."""
        return " ".join(self.text.split("\n\n", 1)[0].split())


def docstrings(source: str | bytes, module: str) -> Iterator[Docstring]:
    """Find the documented public functions, classes and methods of a module.

    Args:
        source: Source code; bytes are decoded as Python itself would.
        module: Name that is put before theirs.

    Raises:
        SyntaxError: If the source is not Python of the running version.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful escapes in somebody else's source
            tree = ast.parse(source)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(f"not readable as Python: {error}") from error
    yield from _documented(tree.body, module, "function")


def standard_library(folder: Path | None = None, *, show_progress_bar: bool = False) -> list[Docstring]:
    """Read the docstrings of the standard library's Python source: functions first, then classes, then methods.

    Args:
        folder: Where the library's source lies; that of the running interpreter if None.
        show_progress_bar: Show a bar on stderr when the reading takes more than a second.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    found: dict[str, Docstring] = {}
    files = tqdm(list(_modules(root)), desc="reading", unit="file", delay=1, disable=not show_progress_bar, leave=False)
    for path, module in files:
        for docstring in docstrings(path.read_bytes(), module):
            found.setdefault(docstring.name, docstring)
    order: tuple[Kind, ...] = ("function", "class", "method")
    return sorted(found.values(), key=lambda docstring: order.index(docstring.kind))


def _modules(root: Path) -> Iterator[tuple[Path, str]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for file in sorted(files):
            path = Path(folder, file)
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            module = _PYTHON_SOURCE_OF.get(module, module)
            parts = module.split(".")
            if path.suffix == ".py" and parts[0] not in _SKIPPED_MODULES and not any(part.startswith("_") for part in parts):
                yield path, module


def _documented(body: list[ast.stmt], prefix: str, kind: Kind) -> Iterator[Docstring]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not node.name.startswith("_"):
                yield from _definition(node, f"{prefix}.{node.name}", kind)
        elif isinstance(node, ast.If):
            yield from _documented([*node.body, *node.orelse], prefix, kind)
        elif isinstance(node, ast.Try):
            handlers = [statement for handler in node.handlers for statement in handler.body]
            yield from _documented([*node.body, *handlers, *node.orelse], prefix, kind)


def _definition(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str, kind: Kind) -> Iterator[Docstring]:
    text = ast.get_docstring(node)
    is_class = isinstance(node, ast.ClassDef)
    if text:
        # An escape in a docstring may stand for half of a surrogate pair, which is not text.
        text = text.encode("utf-8", "replace").decode()
        yield Docstring(name=name, kind="class" if is_class else kind, signature=_signature(node), text=text, line=node.lineno)
    if is_class:
        yield from _documented(node.body, name, "method")


def _signature(node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef):
        makers = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        return _signature(makers[0]) if makers else ""
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    arguments = node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    for places in (arguments.posonlyargs, arguments.args):
        if places and places[0].arg in ("self", "cls"):
            del places[0]
            break
    return f"({ast.unparse(arguments)})"
