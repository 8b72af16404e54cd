"""The layering rule: a file imports from the layers before it alone, third parties stay where they are wanted, and files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "genembed"

LAYERS = (
    ("errors",),
    ("budget", "records", "precision"),
    ("files",),
    ("halting", "prompt", "soft_token", "triton_soft_token"),
    ("pooling",),
    ("settings",),
    ("tokens", "source"),
    ("attention", "cpu", "cuda", "native"),
    ("rows",),
    ("packed",),
    ("parallel", "graphs"),
    ("backbone",),
    ("verify", "refine", "native_step"),
    ("decode",),
    ("engine", "checkpoint", "card"),
    ("hub",),
    ("embedder",),
)
"""From the first to the last; everything else is a ring around them."""

ALLOWED = {
    "peft": ("checkpoint.py", "train/", "integrations/merging.py"),
    "triton": ("triton_soft_token.py", "cuda.py"),
    "typer": ("cli/",),
    "rich": ("cli/", "index/demo.py"),
    "pyarrow": ("files.py", "index/", "train/", "jobs/"),
    "lancedb": ("index/", "integrations/lancedb.py", "jobs/lance.py"),
    "filelock": ("index/table.py", "jobs/claim.py"),
    "fsspec": ("jobs/inputs.py",),
    "ray": ("jobs/cluster.py",),
    "bs4": ("index/html.py",),
    "accelerate": ("train/",),
    "fastapi": ("serve/",),
    "starlette": ("serve/",),
    "uvicorn": ("serve/",),
    "orjson": ("serve/",),
    "pydantic": ("serve/", "integrations/lancedb.py"),
    "prometheus_client": ("serve/", "jobs/metrics.py"),
    "datasets": ("train/", "evaluate/"),
    "matplotlib": ("train/", "analyse/plots.py"),
    "pytrec_eval": ("calibrate/", "evaluate/"),
    "mteb": ("evaluate/", "integrations/mteb.py"),
    "bm25s": ("evaluate/",),
    "scipy": ("analyse/", "evaluate/"),
    "sklearn": ("evaluate/",),
    "sentence_transformers": ("evaluate/", "integrations/sentence_transformers"),
    "langchain_core": ("integrations/langchain.py",),
    "llama_index": ("integrations/llama_index.py",),
    "onnx": ("export/",),
    "onnxruntime": ("export/",),
    "huggingface_hub": ("source.py", "hub.py"),
}
"""The only places of the package that may import these third parties."""

FILES = sorted(PACKAGE.rglob("*.py"))
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def path_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full names a file imports, leaving out what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def test_the_layers_name_every_file_of_the_core() -> None:
    rings = {"__init__", "docstrings", "fingerprint", "testsets", "cost", "spoken"}
    assert {file.stem for file in PACKAGE.glob("*.py")} - rings == set(RANK)


@pytest.mark.parametrize("file", FILES, ids=path_of)
def test_a_file_imports_from_earlier_layers_alone(file: Path) -> None:
    own = RANK.get(path_of(file).removesuffix(".py"))
    if own is None:
        return
    for name in imports(ast.parse(file.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "genembed":
            # `from genembed import checkpoint` names the module last, `from genembed.tokens import TokenBatch` second.
            assert parts[1] in RANK, f"{path_of(file)} imports {name}, which is a ring"
            assert RANK[parts[1]] < own, f"{path_of(file)} imports {name}, which is not an earlier layer"


@pytest.mark.parametrize("file", FILES, ids=path_of)
def test_third_parties_are_imported_where_they_are_wanted_alone(file: Path) -> None:
    for name in imports(ast.parse(file.read_text(encoding="utf-8"))):
        allowed = ALLOWED.get(name.split(".")[0])
        assert allowed is None or path_of(file).startswith(allowed), f"{path_of(file)} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=path_of)
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert lines <= 40, f"{path_of(file)}: {node.name} has {lines} lines"


def test_the_rule_sees_an_import_inside_a_function_and_not_one_for_types_alone() -> None:
    """Guards the test against a parser that looks at the top of the file only."""
    source = "if TYPE_CHECKING:\n    import peft\ndef f():\n    from lancedb import connect\n    import typer.main\n"
    assert list(imports(ast.parse(source))) == ["lancedb.connect", "typer.main"]
