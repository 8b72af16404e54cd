"""`genembed index` and `genembed search` on an index that changes: what they print, and what they refuse."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from genembed import ConfigurationError, InputError
from genembed.index import Passage, read_passages
from genembed.index.chunks import split_code
from genembed.index.html import html_paragraphs
from test_cli import Run, refused, run

__all__ = ["run"]  # the fixture

PAPERS = (
    {"text": "fast embeddings of long texts", "year": 2021, "venue": "ACL"},
    {"text": "slow trains in the alps", "year": 2018, "venue": None},
)


@pytest.fixture(scope="module")
def model(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder double, with a rule that halts."""
    folder = shutil.copytree(folder_of("bert"), tmp_path_factory.mktemp("cli") / "bert")
    settings = json.loads((folder / "genembed.json").read_text())
    settings["halt"] = {"rule": "ConvergeStop", "threshold": 0.95, "max_steps": 6}
    (folder / "genembed.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def place(tmp_path: Path, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with notes, a file of rows, and an index `x` of both, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("The cat sleeps.\n")
    (tmp_path / "notes" / "b.html").write_text("<title>Dogs</title><p>The dog sleeps.")
    (tmp_path / "papers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PAPERS))
    built = run("index", "notes", "papers.jsonl", "-o", "x", "-m", model, "--metadata", "year", "--metadata", "venue")
    assert "x: 4 passages of 32 dimensions" in built.out
    return tmp_path


def paths(found: object) -> list[str]:
    assert isinstance(found, dict)
    return [hit["path"] for hit in found["hits"]]


def test_a_filter_reads_what_was_kept(place: Path, run: Run) -> None:
    assert paths(run("search", "x", "train", "--where", "year > 2020", "--json").json) == ["papers.jsonl"]
    hits = run("search", "x", "sleeps", "--where", "kind = 'md' OR kind = 'html'", "--lexical", "--json").json["hits"]
    assert {hit["reference"]: hit["text"] for hit in hits} == {
        "notes/a.md:1": "The cat sleeps.",
        "notes/b.html:1": "Dogs\n\nThe dog sleeps.",
    }
    assert run("search", "x", "alps", "--lexical", "--json").json["hits"][0]["metadata"] == {"year": 2018, "venue": None}
    refused(run("search", "x", "train", "--where", "yeer > 2020"), "filter 'yeer > 2020'", "No field named yeer", "condition of SQL")


def test_a_lexical_search_loads_no_model_and_a_hybrid_one_joins_both(place: Path, run: Run, model: Path) -> None:
    found = run("search", "x", "sleeping dog", "--hybrid", "-k", 4, "--json").json
    assert len(found["hits"]) == 4
    assert found["steps"] > 0
    moved = place / "moved"
    shutil.copytree("x", moved)
    text = (moved / "genembed-index.json").read_text()
    (moved / "genembed-index.json").write_text(text.replace(str(model), "/nowhere"))
    assert paths(run("search", moved, "dogs", "--lexical", "--json").json) == ["notes/b.html"]
    refused(run("search", moved, "dogs"), "/nowhere")


def test_a_query_may_halt_when_its_hits_are_stable(place: Path, run: Run, model: Path) -> None:
    assert run("search", "x", "dogs", "--halt", "rank", "--where", "path = 'papers.jsonl' AND year = 2021", "--json").json["steps"] == 3
    found = run("search", "x", "dogs", "--halt", "rank", "--patience", 4, "--where", "year = 2021", "--json").json
    assert (found["steps"], paths(found)) == (5, ["papers.jsonl"])
    still = shutil.copytree(model, place / "still")
    settings = json.loads((still / "genembed.json").read_text())
    (still / "genembed.json").write_text(json.dumps({**settings, "halt": {"rule": "FixedSteps", "steps": 0}}))
    refused(run("search", "x", "dogs", "-m", still, "--halt", "rank"), "--halt rank has no effect on a model that does FixedSteps(steps=0)")


def test_an_update_follows_the_files(place: Path, run: Run) -> None:
    (place / "notes" / "a.md").write_text("Birds sing.\n\nThe cat sleeps.\n")
    (place / "notes" / "b.html").unlink()
    (place / "papers.jsonl").write_text("\n" + (place / "papers.jsonl").read_text())
    done = run("index", "notes", "papers.jsonl", "-o", "x", "--update", "--prune", "--json").json
    assert {name: done[name] for name in ("embedded", "copied", "moved", "removed", "unchanged", "rows")} == {
        "embedded": 1, "copied": 0, "moved": 2, "removed": 2, "unchanged": 0, "rows": 3,
    }  # fmt: skip
    assert run("search", "x", "alps", "--lexical", "--json").json["hits"][0]["metadata"]["year"] == 2018
    assert run("search", "x", "dog", "--lexical", "--json").json["hits"] == []
    again = run("index", "notes", "papers.jsonl", "-o", "x", "--update").out
    assert again == "x: 0 passages embedded, 0 copied, 0 moved, 0 removed, 3 as they were; 3 now\n"


def test_passages_are_deleted_by_a_filter(place: Path, run: Run) -> None:
    assert run("index", "-o", "x", "--delete", "year < 2020").out == "x: 1 passages removed, 3 left\n"
    assert run("index", "-o", "x", "--delete", "path LIKE 'notes/%'", "--json").json == {"output": "x", "removed": 2, "rows": 1}
    assert paths(run("search", "x", "anything", "--json").json) == ["papers.jsonl"]


def test_stdin_is_a_source_with_and_without_columns(place: Path, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def piped(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    piped("one line\nanother line\n")
    assert run("index", "-", "-o", "x", "--update", "--json").json["embedded"] == 2
    piped('{"text": "a row", "year": 2000}\n')
    assert run("index", "-", "-o", "y", "-m", model, "--metadata", "year", "--json").json["metadata"] == {"year": "int64"}
    assert run("search", "y", "row", "--where", "year = 2000", "--json").json["hits"][0]["reference"] == "stdin:1"
    piped('{"text": 3, "year": 2000}\n')
    refused(run("index", "-", "-o", "z", "-m", model, "--metadata", "year"), "stdin, line 1: column 'text' holds 3")
    piped("a line\n")
    refused(run("index", "-", "-o", "z", "-m", model, "--metadata", "year"), "read as text lines, which have no columns")


def test_an_approximate_index_is_made_and_its_recall_printed(place: Path, run: Run) -> None:
    line = run("index", "notes", "-o", "x", "--update", "--ann").out
    assert line.endswith("; approximate index IVF_HNSW_SQ, recall@10 1.000 of 4 queries\n")
    made = run("index", "notes", "-o", "x", "--update", "--json").json["approximation"]
    assert made == {"kind": "IVF_HNSW_SQ", "recall": 1.0, "neighbours": 10, "queries": 4}
    near, exact = (run("search", "x", "dogs", "--json", *options).json["hits"] for options in ([], ["--exact"]))
    assert [hit["reference"] for hit in near] == [hit["reference"] for hit in exact]


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("index -o x", ["there is nothing to index"]),
        ("index notes -o x --update --overwrite", ["--overwrite and --update contradict each other"]),
        ("index notes -o x --prune", ["--prune", "give --update with it"]),
        ("index notes -o x --delete true", ["--delete true: removes passages", "leave paths and other options out"]),
        ("index -o x --delete true --steps 3", ["--delete true: removes passages"]),
        ("index -o x --delete year", ["filter 'year'"]),
        ("index notes -o absent --update", ["there is no index"]),
        ("index notes -o x --update --steps 3", ["refined under ConvergeStop", "FixedSteps(steps=3) gives others"]),
        ("index notes -o x --update --instruction Find", ["--instruction 'Find'", "embedded under None"]),
        ("index papers.jsonl -o x --update --metadata year", ["keeps other columns (year venue)"]),
        ("index notes -o y --metadata year", ["--metadata year: only files of rows"]),
        ("index papers.jsonl -o y --metadata text", ["--metadata text: the index has a column of that name"]),
        ("index papers.jsonl -o y --metadata yeer", ["no row has a column 'yeer'"]),
        ("search x q --lexical --hybrid", ["--lexical: compares no vectors"]),
        ("search x q --lexical --steps 3", ["--lexical: loads no model"]),
        ("search x q --patience 3", ["--patience 3: belongs to --halt rank"]),
        ("search x q --halt rank --patience 0", ["patience=0"]),
        ("search x q --halt rank --steps 3", ["--steps 3 and --halt rank both say when to stop"]),
    ],
)
def test_what_makes_no_sense_is_refused(place: Path, run: Run, line: str, fragments: list[str]) -> None:
    refused(run(*line.split()), *fragments)
    assert run("search", "x", "sleeps", "--lexical").err.startswith("2 of 4 passages")


def test_a_csv_file_has_numbers_where_all_values_are(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text,year,price,code,note\na,2020,1.5,01067,x\n"b\nc",,2,10115,\n')
    read = list(read_passages([path], metadata=["year", "price", "code", "note"]))
    assert [passage.metadata for passage in read] == [
        {"year": 2020, "price": 1.5, "code": "01067", "note": "x"},
        {"year": None, "price": 2.0, "code": "10115", "note": None},
    ]
    assert [(passage.text, passage.path, passage.kind) for passage in read] == [("a", str(path), "csv"), ("b\nc", str(path), "csv")]


def test_a_parquet_file_keeps_its_types_and_nested_values_are_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "ok": [True, None], "tags": [["x"], ["y"]]}), path)
    assert [passage.metadata for passage in read_passages([path], metadata=["ok"])] == [{"ok": True}, {"ok": None}]
    with pytest.raises(InputError, match=r"line 1: column 'tags' holds \['x'\]; kept for filters are"):
        list(read_passages([path], metadata=["tags"]))
    with pytest.raises(InputError, match="no row has a column 'absent'"):
        list(read_passages([path], metadata=["absent"]))


@pytest.mark.parametrize("name", ["vector", "Kind", "_rowid", "a.b", "", "year"])
def test_a_column_that_the_table_cannot_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--metadata {name}: the index has a column of that name"):
        list(read_passages([tmp_path], metadata=["year", name]))


def test_a_web_page_is_read_as_its_reader_sees_it() -> None:
    page = b"""<!doctype html><html><head><title>My page</title><style>p {}</style>
<script>var x = "no"</script></head><body>
<h1>Head<b>ing</b></h1><!-- no -->
<p>First <i>para</i>graph<br>two
lines &amp; more</p>loose text
<ul><li>one<li>two</ul>
<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table></body></html>"""
    assert list(html_paragraphs(page, "page")) == [
        *[(1, "My page"), (3, "Heading"), (4, "First paragraph two lines & more"), (4, "loose text")],
        *[(6, "one"), (6, "two"), (7, "a b"), (7, "c")],
    ]
    assert list(html_paragraphs("<meta charset=latin1><p>caf\u00e9".encode("latin1"), "page")) == [(1, "caf\u00e9")]
    assert list(html_paragraphs(b"\xef\xbb\xbfcaf\xc3\xa9", "page")) == [(1, "caf\u00e9")]
    assert list(html_paragraphs(b"", "page")) == []
    with pytest.raises(InputError, match="page: is not utf-8"):
        list(html_paragraphs(b"<p>caf\xe9", "page"))
    with pytest.raises(InputError, match="page: is not nonsense"):
        list(html_paragraphs(b"<meta charset=nonsense><p>x", "page"))


def test_source_code_is_cut_between_blocks_and_keeps_its_indentation(tmp_path: Path) -> None:
    block = "fn f() {\n" + "    a b c d e f g h i j\n" * 9 + "}"
    lines = f"\n{block}\n\n\n{block}\n\nend".split("\n")
    assert list(split_code(lines)) == [(2, block), (15, block), (27, "end")]
    long = ["    " + "w " * 450]
    assert [(line, len(text.split())) for line, text in split_code(long)] == [(1, 200), (1, 200), (1, 50)]
    assert list(split_code(["", " "])) == []
    (tmp_path / "a.rs").write_text("fn main() {\n    run();\n}\n")
    path = tmp_path / "a.rs"
    for named in (tmp_path, path):
        assert list(read_passages([named])) == [
            Passage("fn main() {\n    run();\n}", f"{path}:1", "fn main() { run(); }", str(path), "rs"),
        ]


def test_without_beautiful_soup_the_message_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.raises(ImportError, match=r"beautifulsoup4 is not installed: .* pip install 'genembed\[index\]'"):
        list(html_paragraphs(b"<p>x", "page"))
