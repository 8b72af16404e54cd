"""Reading texts and writing vectors: each format, each thing that can be wrong with a file, and folders that are whole or absent."""

from __future__ import annotations

import csv
import errno
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from genembed import ConfigurationError, InputError, MissingExtraError
from genembed.files import _ASIDE, Record, VectorRows, publish, read_texts, recover, recover_all, replacing_folder, vector_file
from genembed.records import ROW_BYTES

ODD = ["", "  ", "a\0b", "two, three", 'a "quoted" word', "zwei\u2028Zeilen\x85", "caf\u00e9 \U0001f600"]
"""Texts that a careless reader would split, drop or mangle."""


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts_of(path: Path, **options: str) -> list[str]:
    return [record.text for record in read_texts(path, **options)]


def vectors() -> VectorRows:
    return VectorRows(
        ["a", "\u00e9"],
        np.array([[0.1, -1 / 3, 1e-30], [1.0, 0.0, 2**-149]], dtype=np.float32),
        np.array([3, 20]),
        np.array([False, True]),
    )


def test_every_line_of_a_txt_file_is_a_text_and_empty_lines_count(tmp_path: Path) -> None:
    path = written(tmp_path, "texts.txt", "\ufefffirst\r\n\n  third \n\u2028\x85\x0c\nlast")
    assert list(read_texts(path)) == [
        Record("0", "first", 1),
        Record("1", "", 2),
        Record("2", "  third ", 3),
        Record("3", "\u2028\x85\x0c", 4),
        Record("4", "last", 5),
    ]


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "texts.csv"])
def test_an_empty_file_has_no_texts(tmp_path: Path, name: str) -> None:
    assert texts_of(written(tmp_path, name, b"")) == []


def test_odd_texts_survive_jsonl_csv_and_parquet_unchanged(tmp_path: Path) -> None:
    jsonl = written(tmp_path, "t.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ODD))
    table = io.StringIO()
    csv.writer(table, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in ODD)])
    comma = written(tmp_path, "t.csv", table.getvalue())
    parquet.write_table(pa.table({"text": ODD}), tmp_path / "t.parquet")
    assert texts_of(jsonl) == texts_of(comma) == texts_of(tmp_path / "t.parquet") == ODD


def test_a_field_of_a_megabyte_is_read_from_csv(tmp_path: Path) -> None:
    text = "word " * 200_000
    before = csv.field_size_limit(1000)
    assert texts_of(written(tmp_path, "t.csv", f'text\n"{text}"\n')) == [text]
    assert csv.field_size_limit(before) == ROW_BYTES  # and stays so: another file may be under way


def test_named_columns_are_read_and_integers_may_be_ids(tmp_path: Path) -> None:
    jsonl = written(tmp_path, "t.jsonl", '{"body": "x", "key": 7}\n\n{"body": "y", "key": "b"}\n')
    comma = written(tmp_path, "t.csv", 'key,body\n7,"x\ny"\n\nb,z\n')
    parquet.write_table(pa.table({"key": [7, 8], "body": ["x", "y"], "other": [1, 2]}), tmp_path / "t.parquet")
    options = {"text_column": "body", "id_column": "key"}
    assert list(read_texts(jsonl, **options)) == [Record("7", "x", 1), Record("b", "y", 3)]
    assert list(read_texts(comma, **options)) == [Record("7", "x\ny", 2), Record("b", "z", 5)]
    assert list(read_texts(tmp_path / "t.parquet", **options)) == [Record("7", "x", 1), Record("8", "y", 2)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b'{"text": "x"}\n', ["x"]), (b'\xef\xbb\xbf {"text": "x"}\n', ["x"]), (b"x\n{\n", ["x", "{"]), (b"", []), (b"\n{}\n", ["", "{}"])],
)
def test_stdin_is_jsonl_if_it_begins_with_a_brace_and_text_lines_otherwise(
    monkeypatch: pytest.MonkeyPatch, content: bytes, expected: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [record.text for record in read_texts("-")] == expected


def test_stdin_is_read_in_the_format_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table = io.BytesIO()
    parquet.write_table(pa.table({"text": ["x"]}), table)
    for file_format, content, expected in [("txt", b"{x\n", "{x"), ("csv", b"text\nx\n", "x"), ("parquet", table.getvalue(), "x")]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert [record.text for record in read_texts("-", file_format=file_format)] == [expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"fine\ncaf\xe9\n", r"t\.txt, line 2: byte 4 \(0xe9\) is not UTF-8"),
        ("t.jsonl", b'{"text": "x"}\n{"text": \n', r"t\.jsonl, line 2: invalid JSON at character \d+"),
        ("t.jsonl", b'{"text": "x"}\n["x"]\n', r"t\.jsonl, line 2: expected an object"),
        ("t.jsonl", b'{"body": "x", "key": 1}\n', r"line 1: no column 'text'; there are: body, key\. Name one with --text-column"),
        ("t.jsonl", b"{}\n", r"line 1: no column 'text'; there are: none"),
        ("t.jsonl", b'{"text": null}\n', r"line 1: column 'text' holds None, which is not text"),
        ("t.jsonl", b'{"text": 12}\n', r"line 1: column 'text' holds 12, which is not text"),
        ("t.jsonl", b"[" * 100_000, r"line 1: JSON that cannot be read"),
        ("t.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"line 1: JSON that cannot be read"),
        ("t.csv", b"body,key\n", r"t\.csv: no column 'text'; there are: body, key"),
        ("t.csv", b"text,key\na,1\nb, c,2\n", r"line 3: 3 fields, but the header has 2; put quotes"),
        ("t.csv", b'text\n"never closed\n', r"line 2: not valid CSV"),
        ("t.parquet", b"", r"cannot be read as Parquet"),
        ("t.parquet", b"PAR1 not really", r"cannot be read as Parquet"),
    ],
)
def test_wrong_content_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts_of(written(tmp_path, name, content))


@pytest.mark.parametrize("value", ["null", "1.5", "true", '"\\ud800"'])
def test_an_id_is_a_string_or_an_integer(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, "t.jsonl", f'{{"text": "x", "key": {value}}}\n')
    with pytest.raises(InputError, match=r"line 1: column 'key' holds .*; an id is a string or an integer"):
        texts_of(path, id_column="key")


def test_a_parquet_file_names_its_columns_and_the_row_of_a_null(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["x", None], "key": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"row 1: column 'text' holds None"):
        texts_of(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"no column 'body'; there are: text, key"):
        texts_of(tmp_path / "t.parquet", text_column="body")


def test_what_is_no_file_of_texts_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.txt: no such file"):
        texts_of(tmp_path / "absent.txt")
    with pytest.raises(ConfigurationError, match=r"is a folder; .* genembed index"):
        texts_of(tmp_path)
    for name in ("t.doc", "t.txt"):
        written(tmp_path, name, b"")
    with pytest.raises(ConfigurationError, match=r"file type '\.doc' is unknown; known are \.txt, \.jsonl, \.csv, \.parquet: .* --format"):
        texts_of(tmp_path / "t.doc")
    with pytest.raises(ConfigurationError, match=r"format 'xml' is unknown; choose one of txt, jsonl, csv, parquet"):
        texts_of(tmp_path / "t.txt", file_format="xml")
    with pytest.raises(ConfigurationError, match="--text-column body: text lines have no columns"):
        texts_of(tmp_path / "t.txt", text_column="body")
    with pytest.raises(ConfigurationError, match="--id-column key: text lines have no columns"):
        texts_of(tmp_path / "t.txt", id_column="key")


def test_npy_holds_the_vectors_as_float32(tmp_path: Path) -> None:
    with vector_file(tmp_path / "v.npy") as write:
        write(vectors())
    read = np.load(tmp_path / "v.npy")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, vectors().vectors)


def test_parquet_holds_ids_vectors_of_fixed_size_steps_and_flags(tmp_path: Path) -> None:
    with vector_file(tmp_path / "v.parquet") as write:
        write(vectors())
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 3)
    assert table.to_pydict() == {
        "id": ["a", "\u00e9"],
        "vector": vectors().vectors.tolist(),
        "steps": [3, 20],
        "truncated": [False, True],
    }


@pytest.mark.parametrize("target", ["v.jsonl", "-"])
def test_jsonl_gives_every_float32_back_exactly(tmp_path: Path, target: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with vector_file(target if target == "-" else tmp_path / target) as write:
        write(vectors())
    lines = capsysbinary.readouterr().out if target == "-" else (tmp_path / target).read_bytes()
    rows = [json.loads(line) for line in lines.decode().splitlines()]
    assert [(row["id"], row["steps"], row["truncated"]) for row in rows] == [("a", 3, False), ("\u00e9", 20, True)]
    np.testing.assert_array_equal(np.array([row["vector"] for row in rows], dtype=np.float32), vectors().vectors)


@pytest.mark.parametrize("name", ["v.npy", "v.parquet", "v.jsonl"])
def test_no_texts_give_a_file_without_rows(tmp_path: Path, name: str) -> None:
    with vector_file(tmp_path / name) as write:
        write(VectorRows([], np.zeros((0, 3), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_)))
    if name == "v.npy":
        assert np.load(tmp_path / name).shape == (0, 3)
    elif name == "v.parquet":
        assert parquet.read_table(tmp_path / name).schema.field("vector").type.list_size == 3
    else:
        assert (tmp_path / name).read_bytes() == b""


def test_a_run_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    old = written(tmp_path, "v.npy", b"old")

    def interrupted(write: Callable[[VectorRows], None]) -> None:
        write(vectors())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), vector_file(old) as write:
        interrupted(write)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("v.npy", b"old")]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("v.bin", r"output type '\.bin' is unknown; choose one of \.npy, \.parquet, \.jsonl, or - for stdout"),
        ("v", r"output type '' is unknown"),
        (".", r"is a folder; name a file in it, such as .*vectors\.npy"),
        ("absent/v.npy", r"cannot be written: No such file or directory"),
        ("file/v.npy", r"cannot be written: Not a directory"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, target: str, message: str) -> None:
    written(tmp_path, "file", b"")
    with pytest.raises(ConfigurationError, match=message), vector_file(tmp_path / target):
        pytest.fail("the work was begun")


def test_without_pyarrow_the_message_has_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'genembed\[cli\]'"):
        texts_of(written(tmp_path, "t.parquet", b""))


def written_folder(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def test_a_published_folder_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for text in ("first", "second"):
        publish(written_folder(tmp_path / "staged", text), final)
        assert (final / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_whole_folder_is_there_at_every_moment_of_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, seen = written_folder(tmp_path / "final", "first"), []
    rename, remove = Path.rename, shutil.rmtree

    def look() -> None:
        places = [place for place in (final, tmp_path / f"{_ASIDE}final") if place.exists()]
        seen.append([(place / "file").read_text() for place in places])

    def watched_rename(path: Path, target: Path) -> Path:
        look()
        return rename(path, target)

    def watched_remove(path: Path, **options: Any) -> None:
        look()
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", watched_rename)
        patch.setattr(shutil, "rmtree", watched_remove)
        publish(written_folder(tmp_path / "staged", "second"), final)
    assert seen == [["first"], ["first"], ["first"], ["second", "first"]]


def test_a_folder_that_was_never_published_is_not_recovered(tmp_path: Path) -> None:
    recover(tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_every_folder_that_was_moved_aside_is_recovered(tmp_path: Path) -> None:
    for name in (f"{_ASIDE}checkpoint-5", f"{_ASIDE}best", "best", "other"):
        written_folder(tmp_path / name, name)
    recover_all(tmp_path)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {
        "checkpoint-5": f"{_ASIDE}checkpoint-5",
        "best": "best",
        "other": "other",
    }
    recover_all(tmp_path / "nowhere")


def test_a_folder_that_cannot_get_its_name_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, final, rename = written_folder(tmp_path / "staged", "second"), written_folder(tmp_path / "final", "first"), Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path == staged:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="Input/output error"):
        publish(staged, final)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {"staged": "second", "final": "first"}


def test_a_folder_is_replaced_when_the_work_is_done_and_stays_when_it_fails(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for text, fails in (("first", False), ("second", True), ("third", False)):
        with suppress(KeyboardInterrupt), replacing_folder(final) as staged:
            (staged / "file").write_text(text)
            assert not final.exists() or (final / "file").read_text() == "first"
            if fails:
                raise KeyboardInterrupt
        assert (final / "file").read_text() == ("first" if fails else text)
        assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written: No such file or directory"), replacing_folder(tmp_path / "a" / "b"):
        pytest.fail("the work was begun")
