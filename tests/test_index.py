"""The vector index: what goes in, what is found, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bs4
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import doubles
import genembed.index
from genembed import (
    CheckpointError,
    ConfigurationError,
    Embedder,
    FixedSteps,
    GenembedWarning,
    InputError,
    MissingExtraError,
    ModelSettings,
    load,
)
from genembed.fingerprint import _weights_fingerprint, fingerprint
from genembed.index import Index, Passage, read_passages
from genembed.index.chunks import split_prose
from genembed.index.html import html_paragraphs
from genembed.index.passages import beginning_of

TEXTS = ["a stitch in time", "the language of models", "business trips", "fasting glucose", ""]
PASSAGES = [Passage(text, f"row {row}", beginning_of(text)) for row, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def bert(folder_of: Callable[[str], Path]) -> Embedder:
    return load(folder_of("bert"))


@pytest.fixture(scope="module")
def built(bert: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(tmp_path_factory.mktemp("index") / "texts", bert, PASSAGES, halt=FixedSteps(3))


def test_search_ranks_every_text_by_its_cosine_with_the_query(built: Index, bert: Embedder) -> None:
    query = bert.encode("language", steps=3)
    cosines = bert.encode_document(TEXTS, steps=3) @ query
    order = np.argsort(-cosines)
    hits = built.search(2 * query, k=10)
    assert [hit.text for hit in hits] == [TEXTS[row] for row in order]
    assert [hit.reference for hit in hits] == [f"row {row}" for row in order]
    np.testing.assert_allclose([hit.score for hit in hits], cosines[order], atol=1e-5)
    assert built.search(query, k=2) == hits[:2]


def test_the_description_says_what_made_the_index(built: Index, bert: Embedder) -> None:
    made = Index.open(built.folder).description
    assert (made.model, made.dimensions, made.rows, made.steps) == (bert.source.name, 32, len(TEXTS), 3.0)
    assert (made.halt, made.instruction, made.fingerprint) == ("FixedSteps(steps=3)", None, fingerprint(bert))
    assert made.seconds > 0
    assert len(Index.open(built.folder)) == len(TEXTS)


def test_the_description_says_how_the_model_was_loaded(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = folder_of("qwen2")
    adapter = doubles.save_adapter(base, tmp_path / "adapter")
    settings = ModelSettings(halt=FixedSteps(2), special_tokens=(("<s>",), ()))
    for preset in (None, "laser", settings):
        Index.build(tmp_path / "x", load(base, adapter=adapter, preset=preset), PASSAGES[:2], overwrite=True)
        made = Index.open(tmp_path / "x").description
        assert (made.model, made.adapter, made.model_settings) == (str(base), str(adapter), preset)
        Index.open(tmp_path / "x").check(load(made.model, adapter=made.adapter, preset=made.model_settings))


def test_an_index_of_before_the_adapter_was_noted_still_opens(built: Index, tmp_path: Path) -> None:
    shutil.copytree(built.folder, tmp_path / "old")
    path = tmp_path / "old" / "genembed-index.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in known.items() if name not in ("adapter", "preset")}))
    assert Index.open(tmp_path / "old").description == built.description
    assert (built.description.adapter, built.description.model_settings) == (None, None)


def test_an_index_that_was_moved_still_works(built: Index, bert: Embedder, tmp_path: Path) -> None:
    shutil.copytree(built.folder, tmp_path / "moved")
    query = bert.encode("language")
    assert Index.open(tmp_path / "moved").search(query) == built.search(query)


def test_an_index_without_texts_has_no_hits(bert: Embedder, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "none", bert, [])
    assert (len(index), index.description.steps, index.search(bert.encode("x"))) == (0, 0.0, [])


def test_documents_are_embedded_under_the_instruction(bert: Embedder, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "x", bert, PASSAGES[:1], instruction="Classify", halt=FixedSteps(2))
    same = bert.encode(TEXTS[0], instruction="Classify", steps=2)
    np.testing.assert_allclose(index.search(same)[0].score, 1.0, atol=1e-5)
    assert index.description.instruction == "Classify"


def test_documents_are_embedded_under_the_models_own_instruction_if_none_is_given(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(folder_of("bert"))
    model.settings = replace(model.settings, document_instruction="Represent", halt=FixedSteps(2))
    index = Index.build(tmp_path / "x", model, PASSAGES[:1])
    np.testing.assert_allclose(index.search(model.encode(TEXTS[0], instruction="Represent"))[0].score, 1.0, atol=1e-5)
    assert index.description.instruction == "Represent"


def test_another_model_is_refused_and_the_same_one_under_another_rule_is_not(built: Index, embedder_of: Callable[..., Embedder]) -> None:
    other = embedder_of("qwen2")
    with pytest.raises(ConfigurationError, match=r"made by the model '.*bert' \(32 dimensions\); those of '.*qwen2'.* --overwrite"):
        built.check(other)
    folder = Path(built.description.model)
    built.check(load(folder))


def test_changed_weights_and_changed_settings_change_the_fingerprint(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genembed.fingerprint._SAMPLE_BYTES", 16)
    folder = shutil.copytree(folder_of("bert"), tmp_path / "bert")
    first = load(folder)
    known = fingerprint(first)
    first.settings = replace(first.settings, halt=FixedSteps(5), query_instruction="Find")
    assert fingerprint(first) == known
    first.settings = replace(first.settings, temperature=0.5)
    assert fingerprint(first) != known
    weights = folder / "soft_token_head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert fingerprint(load(folder)) != known


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_configuration_and_a_changed_tokenizer_change_the_fingerprint(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(folder_of("bert"), tmp_path / "bert")
    embedder = load(folder)
    index = Index.build(tmp_path / "x", embedder, PASSAGES[:1], halt=FixedSteps(1))
    (folder / name).write_text((folder / name).read_text() + " ")
    with pytest.raises(ConfigurationError, match="as its weights, tokenizer and settings are now"):
        index.check(embedder)


def test_the_configuration_of_an_adapter_changes_the_fingerprint(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = doubles.save_adapter(folder_of("qwen2"), tmp_path / "adapter")
    embedder = load(folder_of("qwen2"), adapter=adapter)
    known = fingerprint(embedder)
    assert known != fingerprint(load(folder_of("qwen2")))
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + " ")
    assert fingerprint(embedder) != known


def test_an_index_of_before_tokenizers_were_hashed_is_compared_by_weights_and_settings(
    built: Index, bert: Embedder, embedder_of: Callable[..., Embedder]
) -> None:
    old = Index(built.folder, replace(built.description, fingerprint=_weights_fingerprint(bert)), built._table)
    assert old.description.fingerprint != built.description.fingerprint
    old.check(bert)
    with pytest.raises(ConfigurationError, match="made by the model"):
        old.check(embedder_of("qwen2"))


@pytest.mark.parametrize(("vector", "k", "message"), [(np.ones(32), 0, "k=0: at least one hit"), (np.ones(31), 1, r"shape \(31,\)")])
def test_a_search_that_cannot_be_done_is_refused(built: Index, vector: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        built.search(vector, k=k)


def test_an_existing_index_is_replaced_only_when_that_is_said(bert: Embedder, tmp_path: Path) -> None:
    Index.build(tmp_path / "x", bert, PASSAGES)
    with pytest.raises(ConfigurationError, match="there is an index already; replace it with --overwrite"):
        Index.build(tmp_path / "x", bert, PASSAGES[:1])
    assert len(Index.open(tmp_path / "x")) == len(PASSAGES)
    assert len(Index.build(tmp_path / "x", bert, PASSAGES[:1], overwrite=True)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_is_no_index_is_never_replaced(bert: Embedder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    for name, message in [("file", "is a file; an index is a folder"), ("folder", "other things in it"), ("absent/x", "cannot be written")]:
        with pytest.raises(ConfigurationError, match=message):
            Index.build(tmp_path / name, bert, PASSAGES, overwrite=True)
    assert (tmp_path / "folder" / "mine.txt").read_text() == "mine"


def test_a_build_that_fails_leaves_the_old_index_and_nothing_else(bert: Embedder, tmp_path: Path) -> None:
    Index.build(tmp_path / "x", bert, PASSAGES)
    for _ in range(2):
        with pytest.raises(InputError, match=r"bad: row 1: .* lone surrogate"):
            Index.build(tmp_path / "x", bert, [PASSAGES[0], Passage("\ud800", "bad", "bad")], overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert len(Index.open(tmp_path / "x")) == len(PASSAGES)


def test_a_folder_without_a_sound_index_is_refused(built: Index, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no index .*; make one with: genembed index"):
        Index.open(tmp_path)
    description = json.loads((built.folder / "genembed-index.json").read_text())
    for name, content, message in [
        ("text", "{", "damaged; build it again"),
        ("list", "[]", "damaged; build it again"),
        ("field", json.dumps({**description, "unknown": 1}), "damaged; build it again"),
        ("rows", json.dumps({**description, "rows": 99}), "says 99 rows, and there are 5"),
    ]:
        shutil.copytree(built.folder, tmp_path / name)
        (tmp_path / name / "genembed-index.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            Index.open(tmp_path / name)
    (tmp_path / "rows" / "genembed-index.json").write_text(json.dumps({**description, "format_version": 2}))
    with pytest.raises(ConfigurationError, match="format_version 2 is not 1"):
        Index.open(tmp_path / "rows")
    shutil.rmtree(tmp_path / "text" / "passages.lance")
    shutil.copy(built.folder / "genembed-index.json", tmp_path / "text")
    with pytest.raises(CheckpointError, match="damaged"):
        Index.open(tmp_path / "text")


def test_a_table_that_breaks_after_it_was_opened_is_called_damaged(bert: Embedder, tmp_path: Path) -> None:
    Index.build(tmp_path / "x", bert, PASSAGES)
    index = Index.open(tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "passages.lance" / "data")
    with pytest.raises(CheckpointError, match="damaged"):
        index.search(np.ones(32, np.float32))


def test_without_lancedb_the_message_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    for name in [name for name in sys.modules if name.split(".")[:2] == ["genembed", "index"]]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"lancedb is not installed: .* pip install 'genembed\[index\]'"):
        __import__("genembed.index")
    monkeypatch.undo()
    assert sys.modules["genembed.index"] is genembed.index


def test_a_file_of_rows_gives_one_passage_for_each(tmp_path: Path) -> None:
    lines, rows = tmp_path / "t.txt", tmp_path / "t.jsonl"
    lines.write_text("one\n\ntwo\n")
    rows.write_text('\n{"text": "three", "id": "c"}\n')
    assert list(read_passages([lines, rows])) == [
        Passage("one", f"{lines}:1", "one", str(lines), "txt"),
        Passage("two", f"{lines}:3", "two", str(lines), "txt"),
        Passage("three", f"{rows}:2", "three", str(rows), "jsonl"),
    ]
    assert [passage.reference for passage in read_passages([rows], id_column="id")] == ["c"]


def test_a_folder_gives_passages_of_its_text_files_and_docstrings_of_its_source(tmp_path: Path) -> None:
    for name, content in {
        "b/notes.md": "# Title\n\nFirst.\n",
        "a.py": 'raise SystemExit\ndef area(w, h=1):\n    """Return\n    the area."""\n',
        "p/__init__.py": 'class C:\n    "A class."\n',
        "c.rst": "Text\n",
        "d.bin": "no",
        ".hidden/e.txt": "no",
        "__pycache__/f.py": "no",
        ".g.txt": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(read_passages([tmp_path])) == [
        Passage("a.area(w, h=1): Return the area.", f"{tmp_path}/a.py:2", "a.area: Return the area.", f"{tmp_path}/a.py", "py"),
        Passage("Text", f"{tmp_path}/c.rst:1", "Text", f"{tmp_path}/c.rst", "rst"),
        Passage("# Title\n\nFirst.", f"{tmp_path}/b/notes.md:1", "# Title First.", f"{tmp_path}/b/notes.md", "md"),
        Passage("p.C: A class.", f"{tmp_path}/p/__init__.py:1", "p.C: A class.", f"{tmp_path}/p/__init__.py", "py"),
    ]
    assert list(read_passages([tmp_path / "c.rst"])) == [Passage("Text", f"{tmp_path}/c.rst:1", "Text", f"{tmp_path}/c.rst", "rst")]


def test_unreadable_files_of_a_folder_are_left_out_with_a_warning_and_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"fine\n\n\xe9")
    (tmp_path / "c.py").write_text("x = 1\ndef f(:")
    with pytest.warns(UserWarning, match=r"2 of 3 files below .* were left out; the first: .*b\.txt, line 3: byte 1"):
        assert [passage.text for passage in read_passages([tmp_path])] == ["fine"]
    with pytest.raises(InputError, match=r"c\.py, line 2: not readable as Python"):
        list(read_passages([tmp_path / "c.py"]))
    with pytest.raises(ConfigurationError, match=r"absent\.md: no such file"):
        list(read_passages([tmp_path / "absent.md"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=r"no text, web page or source code in this folder or below it \(\.txt, \.md"):
        list(read_passages([tmp_path / "empty"]))


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b"<meta charset=undefined><p>x", "page: is not undefined"),
        (b"<meta charset=idna><p>x.xn--\x80.y", "page: is not idna"),
        (b"<meta charset=idna><p>x.xn--abc.", "page: is not idna"),
        (b'<meta charset="a\0b"><p>x', "page: is not a\0b"),
        (b"<meta charset=unicode_escape><p>\\ud800", "page: is not unicode_escape.* surrogates"),
    ],
)
def test_a_web_page_that_cannot_be_read_is_left_out_of_its_folder(tmp_path: Path, page: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        list(html_paragraphs(page, "page"))
    (tmp_path / "a.html").write_bytes(page)
    (tmp_path / "b.html").write_bytes(b"<p>fine")
    with pytest.warns(GenembedWarning, match=r"1 of 2 files below .* were left out; the first: .*a\.html: is "):
        assert [passage.text for passage in read_passages([tmp_path])] == ["fine"]


@pytest.mark.parametrize("page", [b"<p>x<![foo bar", b"<p>&#" + 5000 * b"1" + b";"])
@pytest.mark.filterwarnings("ignore:1 of 2 files")  # whether the parser gives up on them depends on Python's version
def test_markup_that_is_no_markup_does_not_end_the_reading_of_its_folder(tmp_path: Path, page: bytes) -> None:
    (tmp_path / "a.html").write_bytes(page)
    (tmp_path / "b.html").write_bytes(b"<p>fine")
    assert [passage.text for passage in read_passages([tmp_path])][-1] == "fine"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(bs4.ParserRejectedMarkup(AssertionError("unknown keyword")), "unknown keyword"), (ValueError("5000 digits"), "5000 digits")],
)
def test_markup_that_the_parser_gives_up_on_is_the_files_fault(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def rejecting(*_: object) -> None:
        raise error

    monkeypatch.setattr(bs4, "BeautifulSoup", rejecting)
    with pytest.raises(InputError, match=f"^page: is markup that cannot be read as a web page: {reason}; mend it, or leave the file out"):
        list(html_paragraphs(b"<p>x", "page"))


@pytest.mark.parametrize("declared", ["utf-16", "UTF-16LE", "utf-32", "cp037"])
def test_a_page_that_declares_in_ascii_what_is_no_ascii_is_read_as_utf8(declared: str) -> None:
    page = f"<meta charset={declared}><p>caf\u00e9s"  # of either length: UTF-16 would take the even one silently
    for text in (page, page + "!"):
        assert [found for _, found in html_paragraphs(text.encode(), "page")] == [text.rpartition(">")[2]]
    assert [found for _, found in html_paragraphs(f'<?xml version="1.0" encoding="{declared}"?><p>x'.encode(), "page")] == ["x"]
    assert [found for _, found in html_paragraphs(b"\xff\xfe" + page.encode("utf-16-le"), "page")] == ["caf\u00e9s"]


def test_a_folder_that_cannot_be_listed_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.md").write_text("fine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("hidden")
    unread: list[str] = []
    close_folder(monkeypatch, tmp_path / "sub")
    with pytest.warns(GenembedWarning, match=r"1 folders below .* were left out; the first: .*sub: cannot be listed: Permission denied"):
        assert [passage.text for passage in read_passages([tmp_path], unread=unread)] == ["fine"]
    assert unread == [str(tmp_path / "sub")]
    with pytest.raises(ConfigurationError, match=r"sub: nothing to index was found: .*sub: cannot be listed: Permission denied; make it"):
        list(read_passages([tmp_path / "sub"]))


def close_folder(monkeypatch: pytest.MonkeyPatch, closed: Path) -> None:
    """Refuse to list a folder, as its mode would if the tests did not run as root."""
    scandir = os.scandir

    def refusing(place: str | Path) -> object:
        if Path(place) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)


def test_prose_is_cut_at_empty_lines_when_two_hundred_words_are_full() -> None:
    lines = ["one " * 150, "", "two " * 50, " ", "three"]
    assert [(line, len(text.split())) for line, text in split_prose(lines)] == [(1, 200), (5, 1)]
    assert list(split_prose(["", " ", ""])) == []


@given(st.lists(st.lists(st.sampled_from(["a", "bc", "def"]), max_size=450).map(" ".join), max_size=8))
def test_no_word_is_lost_no_passage_is_too_long_and_lines_are_right(lines: list[str]) -> None:
    passages = list(split_prose(lines))
    assert [word for _, text in passages for word in text.split()] == [word for line in lines for word in line.split()]
    for number, text in passages:
        assert 1 <= len(text.split()) <= 200
        assert text.split("\n")[0].strip() in lines[number - 1]


def test_the_beginning_of_a_long_text_is_one_line_that_ends_in_an_ellipsis() -> None:
    assert beginning_of(" a\n\tb ") == "a b"
    assert beginning_of("x" * 1_000_000, 5) == "xxxx…"
