"""The input of corpus jobs: which files, which rows, and where a shard of them stands."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from genembed import ConfigurationError, InputError
from genembed.errors import JobError
from genembed.jobs.inputs import find_files
from genembed.jobs.plan import Plan, make_plan
from genembed.jobs.rows import Row, read_shard
from genembed.records import Columns

Texts = Sequence[str]

ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)


def jsonl(texts: Texts) -> bytes:
    """Every third row is followed by a blank line, which is no row."""
    blank = ("", "\n", " \r\n")
    return "".join(f"{json.dumps({'id': text, 'text': text}, ensure_ascii=False)}\n{blank[n % 3]}" for n, text in enumerate(texts)).encode()


def table(texts: Texts) -> bytes:
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, quoting=csv.QUOTE_ALL)
    writer.writerows([["text", "id"], *([text, text] for text in texts)])
    return lines.getvalue().encode()


def arrow(texts: Texts) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"id": list(texts), "n": range(len(texts)), "text": list(texts)}), sink, row_group_size=3)
    return bytes(sink.getvalue())


WRITERS = {"jsonl": jsonl, "csv": table, "parquet": arrow}


def read(plan: Plan) -> list[list[Row]]:
    shards = []
    for shard in plan.shards:
        rows, rejects = read_shard(plan, shard)
        assert rejects == []
        shards.append(rows)
    return shards


@given(data=st.data(), shard_rows=st.integers(1, 7))
def test_shards_cut_any_files_into_their_rows_in_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shard_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    expected: list[str] = []
    for number in range(data.draw(st.integers(0, 3))):
        kind = data.draw(st.sampled_from(sorted(WRITERS)))
        texts = data.draw(st.lists(ANY_TEXT, min_size=1, max_size=9))
        (folder / f"{number}.{kind}").write_bytes(WRITERS[kind](texts))
        expected += texts
    (folder / "note.md").write_text("is left out")
    (folder / "9.txt").write_bytes(b"\r\nline")
    plan = make_plan(find_files([str(folder)], None), Columns("text", None), shard_rows)
    shards = read(plan)
    assert [row.text for rows in shards for row in rows] == [*expected, "", "line"]
    assert [row.number for rows in shards for row in rows] == list(range(len(expected) + 2))
    assert {len(rows) for rows in shards[:-1]} <= {shard_rows}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("kind", WRITERS)
def test_ids_and_places_come_from_the_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"rows.{kind}").write_bytes(WRITERS[kind](["one", "two\nlines", "three", "four", "five"]))
    plan = make_plan(find_files([str(tmp_path / f"rows.{kind}")], None), Columns("text", "id"), 2)
    rows = [row for shard in read(plan) for row in shard]
    assert [row.id for row in rows] == ["one", "two\nlines", "three", "four", "five"]
    lines = {"jsonl": (1, 2, 4, 6, 7), "csv": (2, 3, 6, 7, 8), "parquet": (1, 2, 3, 4, 5)}[kind]
    assert [int(row.place.rsplit(" ", 1)[1]) for row in rows] == list(lines)


def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(["one", "two", "three"])))
    plan = make_plan(find_files([str(tmp_path)], None), Columns("text", None), 2)
    assert [[row.text for row in rows] for rows in read(plan)] == [["one", "two"], ["three"]]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(["one", "two", "three"]))[:-9])
    with pytest.raises(JobError, match=r"rows.jsonl.gz: cannot be read: Compressed file ended"):
        make_plan(find_files([str(tmp_path)], None), Columns("text", None), 2)


def test_files_of_other_file_systems_are_read_by_their_urls() -> None:
    with fsspec.open("memory://corpus/b.jsonl", "wb") as file:
        file.write(jsonl(["one", "two"]))
    with fsspec.open("memory://corpus/a.csv", "wb") as file:
        file.write(table(["zero"]))
    files = find_files(["memory://corpus"], None)
    assert [file.url for file in files] == ["memory:///corpus/a.csv", "memory:///corpus/b.jsonl"]
    assert [row.text for rows in read(make_plan(files, Columns("text", None), 2)) for row in rows] == ["zero", "one", "two"]


def test_a_pattern_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    found = find_files([str(tmp_path / "*.jsonl"), str(tmp_path / "c.csv")], None)
    assert [Path(file.url).name for file in found] == ["a.jsonl", "b.jsonl", "c.csv"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["empty"], "empty: no jsonl, csv, parquet, txt file is there"),
        (["*.parquet"], r"\*.parquet: no jsonl"),
        (["rows.dat"], "rows.dat: the name does not tell its format; say it with --format"),
        (["rows.jsonl", "*.jsonl"], "rows.jsonl: given twice"),
        (["nosuchprotocol://x"], "nosuchprotocol://x: cannot be read: Protocol not known"),
    ],
)
def test_inputs_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("rows.jsonl", "rows.dat"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(ConfigurationError, match=words):
        find_files(inputs, None)


def test_a_wrong_column_is_refused_before_anything_is_embedded(tmp_path: Path) -> None:
    for kind, write in WRITERS.items():
        (tmp_path / f"rows.{kind}").write_bytes(write(["one"]))
        with pytest.raises(InputError, match=r"no column 'body'; there are: .*text.*\. Name one with --columns"):
            make_plan(find_files([str(tmp_path / f"rows.{kind}")], None), Columns("body", None, "--columns"), 2)


def test_broken_tables_are_refused_before_anything_is_embedded(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text\n"a quote that does not "end"\n')
    (tmp_path / "rows.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match=r"rows.csv, line 2: not valid CSV"):
        make_plan(find_files([str(tmp_path / "rows.csv")], None), Columns("text", None), 2)
    with pytest.raises(InputError, match=r"rows.parquet: cannot be read as Parquet"):
        make_plan(find_files([str(tmp_path / "rows.parquet")], None), Columns("text", None), 2)


def test_a_line_of_a_table_with_too_few_fields_or_foreign_bytes_is_one_rejected_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"id,text\n1,good\n2\n3,\xe9t\xe9\n4,good\n")
    plan = make_plan(find_files([str(tmp_path / "rows.csv")], None), Columns("text", "id"), 10)
    rows, rejects = read_shard(plan, plan.shards[0])
    assert [row.id for row in rows] == ["1", "4"]
    assert [(reject.number, reject.place.rsplit(" ", 1)[1]) for reject in rejects] == [(1, "3"), (2, "4")]
    assert rejects[0].reason == "1 fields, but the header has 2; put quotes around a text that holds commas."
    assert "not UTF-8" in rejects[1].reason


def test_a_line_of_no_break_spaces_is_a_row_that_is_rejected_and_not_a_changed_file(tmp_path: Path) -> None:
    """Bytes and characters do not agree on what a blank is."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\u00a0\n{"text": "two"}\n', encoding="utf-8")
    plan = make_plan(find_files([str(tmp_path / "rows.jsonl")], None), Columns("text", None), 10)
    rows, rejects = read_shard(plan, plan.shards[0])
    assert [row.number for row in rows] == [0, 2]
    assert [reject.number for reject in rejects] == [1]


def test_a_shard_has_a_row_at_least() -> None:
    with pytest.raises(ConfigurationError, match="shard_rows=0: a shard has at least one row"):
        make_plan([], Columns("text", None), 0)
