"""`genembed convert --to sentence-transformers`: the folder, and the mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from genembed import cli


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # of the fixtures
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_convert_writes_the_folder_and_says_how_it_is_loaded(
    capsys: pytest.CaptureFixture[str], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "st"
    code, shown, err = _run(capsys, "convert", folder_of("qwen2"), out, "--to", "sentence-transformers")
    assert (code, err) == (0, "")
    assert shown.startswith(f"{out}: sentence-transformers, float32, ")
    modules = json.loads((out / "modules.json").read_text())
    assert [module["type"] for module in modules] == [
        "genembed.integrations.sentence_transformers.GenerativeEmbedding",
        "sentence_transformers.models.Normalize",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["st"], "something was left beside the folder"
    code, shown, _ = _run(capsys, "convert", folder_of("qwen2"), tmp_path / "two", "--to", "sentence-transformers", "--json")
    assert json.loads(shown)["largest_difference"] < 1e-6


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("MODEL", "OUT", "--to", "tensorflow"), "'--to'"),
        (("MODEL", "OUT"), "'--to'"),
        (("MODEL", "MODEL", "--to", "sentence-transformers"), "is there already and is not an empty folder"),
        (("MODEL", "OUT", "--to", "sentence-transformers", "--dtype", "float16"), "keeps the model's own weights"),
        (("/nowhere", "OUT", "--to", "sentence-transformers"), "'/nowhere' is neither a folder, nor a hub id"),
        (("owner/name", "OUT", "--to", "sentence-transformers", "--offline"), "not found in the local cache"),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], folder_of: Callable[[str], Path], tmp_path: Path, arguments: tuple[str, ...], fragment: str
) -> None:
    places = {"MODEL": folder_of("qwen2"), "OUT": tmp_path / "out"}
    code, shown, err = _run(capsys, "convert", *(places.get(argument, argument) for argument in arguments))
    assert (code, shown, err.count("\n")) == (2, "", 1)
    assert fragment in err
    assert list(tmp_path.iterdir()) == []
