"""Training pairs out of data files: each layout, each format, and each thing that can be wrong with a row."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from genembed import ConfigurationError, GenembedError, MissingExtraError
from genembed.errors import DataError
from genembed.train.pairs import BadRows, DataFile, Pair, folded, is_scored, read_pairs

BGE = {"query": "q", "pos": ["p", "r"], "neg": ["n"], "prompt": "Retrieve it", "type": "asymmetric"}


def written(path: Path, rows: Iterable[object]) -> Path:
    """Write objects as JSON lines, and strings and bytes as they are."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row, ensure_ascii=True).encode()
        for row in rows
    ]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def pairs_of(path: Path | str, bad: BadRows | None = None, *, first: int | None = None, **options: Any) -> list[Pair]:
    numbered = read_pairs(DataFile(path=str(path), **options), BadRows() if bad is None else bad)
    return [pair for _, pair in islice(numbered, first)]


def pair(query: str, positive: str = "p", **options: Any) -> Pair:
    values = {"positives": (positive,), "negatives": (), "instruction": None, "source": "t", "symmetric": False, "score": None}
    return Pair(query=query, **{**values, **options})


def bge(query: str) -> dict[str, object]:
    return {"query": query, "pos": [f"p of {query}"], "neg": []}


def test_data_errors_are_genembed_errors_and_value_errors() -> None:
    assert issubclass(DataError, GenembedError)
    assert issubclass(DataError, ValueError)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (BGE, pair("q", positives=("p", "r"), negatives=("n",), instruction="Retrieve it")),
        ({"query": "q", "pos": "p"}, pair("q")),
        ({"query": "q", "pos": ["p"], "neg": None, "prompt": "", "type": None, "other": 1}, pair("q")),
        ({"query": "q", "pos": ["p"], "neg": "n", "type": "symmetric_sts"}, pair("q", negatives=("n",), symmetric=True)),
        ({"anchor": "q", "positive": "p"}, pair("q")),
        ({"anchor": "q", "positive": "p", "negative": "n"}, pair("q", negatives=("n",))),
        ({"anchor": "q", "positive": ["p", "r"], "negative": ["n", "m"]}, pair("q", positives=("p", "r"), negatives=("n", "m"))),
        ({"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": None, "negative_10": "m"}, pair("q", negatives=("n", "m"))),
        ({"anchor": "q", "positive": "p", "negative_of": "x"}, pair("q")),
        ({"sentence1": "q", "sentence2": "p"}, pair("q", symmetric=True)),
        ({"sentence1": "q", "sentence2": "p", "score": 0.25}, pair("q", symmetric=True, score=0.25)),
        ({"sentence1": "q", "sentence2": "p", "score": 1}, pair("q", symmetric=True, score=1.0)),
        ({"sentence1": "q", "sentence2": "p", "score": 0.5, "label": 1}, pair("q", symmetric=True, score=0.5)),
        ({"sentence1": "q", "sentence2": "p", "label": 1}, pair("q", symmetric=True, score=1.0)),
        ({"sentence1": "q", "sentence2": "p", "label": 0}, pair("q", symmetric=True, score=0.0)),
        ({"sentence1": "q", "sentence2": "p", "label": True}, pair("q", symmetric=True, score=1.0)),
    ],
)
def test_the_columns_of_a_row_say_its_layout(tmp_path: Path, row: dict[str, object], expected: Pair) -> None:
    path, bad = written(tmp_path / "t.jsonl", [row]), BadRows()
    assert pairs_of(path, bad) == [expected]
    assert (bad.total, bad.texts, bad.examples) == (0, {}, [])
    assert is_scored(DataFile(path=str(path))) == (expected.score is not None)


@pytest.mark.parametrize(
    ("kind", "symmetric"),
    [("symmetric_sts", True), ("symmetric_clustering", True), ("symmetric_class", False), ("normal", False), ("only_1neg", False)],
)
def test_the_type_of_a_row_says_whether_it_is_symmetric(tmp_path: Path, kind: str, symmetric: bool) -> None:
    assert pairs_of(written(tmp_path / "t.jsonl", [{**BGE, "type": kind}]))[0].symmetric is symmetric


def test_what_the_file_says_goes_before_what_the_rows_say(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [{**BGE, "prompt": 7, "type": "unheard of"}])
    (read,) = pairs_of(path, name="mine", instruction="Find it", symmetric=True)
    assert (read.source, read.instruction, read.symmetric) == ("mine", "Find it", True)


def test_scores_are_divided_by_the_score_that_means_the_same(tmp_path: Path) -> None:
    rows = [{"sentence1": f"q{score}", "sentence2": "p", "score": score} for score in (0, 2.5, 5)]
    assert [read.score for read in pairs_of(written(tmp_path / "t.jsonl", rows), max_score=5)] == [0.0, 0.5, 1.0]


def test_the_reference_data_is_read_as_its_documentation_says(shared: Path) -> None:
    options = {
        "train/cad_snli_triplets.jsonl.gz": {},
        "train/jeopardy.jsonl.gz": {},
        "sts/stsb.jsonl": {"max_score": 5},
        "pairs/mrpc.jsonl": {},
    }
    reads = {name: pairs_of(shared / "data" / name, first=300, **own) for name, own in options.items()}
    first = reads["train/cad_snli_triplets.jsonl.gz"][0]
    assert first == Pair(
        query="A man is riding a red motorcycle with a small child sitting in front of him.",
        positives=("A man rides his motorcycle with a child.",),
        negatives=("A man rides his car with his son.",),
        instruction="Given a premise, retrieve a hypothesis that is entailed by the premise",
        source="cad_snli_triplets",
        symmetric=True,
        score=None,
    )
    assert {read.symmetric for read in reads["train/jeopardy.jsonl.gz"]} == {False}
    assert {read.score for read in reads["sts/stsb.jsonl"]} >= {0.0, 0.76, 1.0}
    assert {read.score for read in reads["pairs/mrpc.jsonl"]} == {0.0, 1.0}


SENTENCES = {"sentence1": "a", "sentence2": "b"}
SCORED = {**SENTENCES, "score": 0.5}


@pytest.mark.parametrize(
    ("good", "bad", "reason", "detail"),
    [
        (BGE, "{", "invalid JSON", "character 2: Expecting property name"),
        (BGE, "[" * 100_000, "invalid JSON", ""),
        (BGE, '{"query": ' + "1" * 5000 + "}", "invalid JSON", "Exceeds the limit"),
        (BGE, b'{"query": "caf\xe9"}', "not UTF-8", "byte 15 is 0xe9"),
        (BGE, '["q", "p"]', "not a JSON object", r"\['q', 'p'\]"),
        (BGE, {"pos": ["p"]}, "no query", ""),
        (BGE, {**BGE, "query": None}, "no query", ""),
        (BGE, {"query": "q"}, "no positive", ""),
        (BGE, {**BGE, "pos": []}, "no positive", ""),
        (BGE, {**BGE, "pos": None}, "no positive", ""),
        (BGE, {**BGE, "query": " \n\u2003"}, "empty text", "column 'query'"),
        (BGE, {**BGE, "pos": ["p", ""]}, "empty text", "column 'pos'"),
        (BGE, {**BGE, "neg": ["\t"]}, "empty text", "column 'neg'"),
        (BGE, {**BGE, "query": 7}, "wrong type", "column 'query' holds 7"),
        (BGE, {**BGE, "query": ["q", "r"]}, "wrong type", "several texts where one is needed"),
        (BGE, {**BGE, "pos": [None]}, "wrong type", "column 'pos' holds None"),
        (BGE, {**BGE, "neg": {"n": 1}}, "wrong type", "column 'neg' holds {'n': 1}"),
        (BGE, {**BGE, "prompt": 1}, "wrong type", "column 'prompt' holds 1"),
        (BGE, {**BGE, "prompt": ["a", "b"]}, "wrong type", "column 'prompt' holds several texts"),
        (BGE, {**BGE, "type": "unheard of"}, "unknown type", "'unheard of'; known are symmetric_sts.*symmetric=True or False"),
        (BGE, {**BGE, "type": ["x"]}, "unknown type", ""),
        (BGE, {**BGE, "query": "\ud800"}, "lone surrogate", r"column 'query' holds '\\ud800'"),
        (BGE, {**BGE, "neg": ["fine", "\udfff"]}, "lone surrogate", "column 'neg'"),
        (BGE, {**BGE, "pos": "Q"}, "positive equals the query", "'q'"),
        (BGE, {**BGE, "query": "a  B", "pos": ["A\nb", "a b"]}, "positive equals the query", "'a  B'"),
        (SCORED, SENTENCES, "no score", "column 'score' holds None"),
        (SCORED, '{"sentence1": "a", "sentence2": "b", "score": NaN}', "no score", "holds nan"),
        (SCORED, {**SENTENCES, "score": "0.5"}, "wrong type", "column 'score' holds '0.5'"),
        (SCORED, {**SENTENCES, "score": True}, "wrong type", "column 'score' holds True"),
        (SCORED, {**SENTENCES, "score": 3}, "score out of range", r"3 is not in 0\.\.1; say with max_score"),
        (SCORED, {**SENTENCES, "score": -0.1}, "score out of range", ""),
        (SCORED, '{"sentence1": "a", "sentence2": "b", "score": Infinity}', "score out of range", ""),
        (SCORED, {**SCORED, "sentence2": ["b", "c"]}, "wrong type", "several texts where one is needed"),
        ({**SENTENCES, "label": 1}, {**SENTENCES, "label": 2}, "wrong label", "2 is neither 0 nor 1"),
        ({**SENTENCES, "label": 1}, {**SENTENCES, "label": "1"}, "wrong label", ""),
        ({**SENTENCES, "label": 1}, {**SENTENCES, "label": None}, "no score", "column 'label' holds None"),
        (SENTENCES, {**SENTENCES, "label": 0}, "unexpected score", "the first row of the file has none"),
        (SENTENCES, SCORED, "unexpected score", ""),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_counted_and_named_and_the_others_are_read(
    tmp_path: Path, good: dict[str, object], bad: object, reason: str, detail: str
) -> None:
    path = written(tmp_path / "t.jsonl", [good, "", bad, good])
    file, found = DataFile(path=str(path)), BadRows()
    assert [line for line, _ in read_pairs(file, found)] == [1, 4]
    assert (found.rows, found.total) == ({reason: 1}, 1)
    (example,) = found.examples
    assert example.startswith(f"{path}:3: {reason}")
    with pytest.raises(DataError, match=rf"t\.jsonl:3: {reason}.*{detail}") as caught:
        list(read_pairs(file, BadRows(), strict=True))
    assert str(caught.value).endswith("Mend or drop the row, or pass over such rows with strict=False.")


def test_texts_that_say_nothing_new_are_taken_out_and_counted(tmp_path: Path) -> None:
    row = {"query": "Query", "pos": ["query ", "p"], "neg": ["QUERY", "P", "n", "query p"]}
    bad = BadRows()
    (read,) = pairs_of(written(tmp_path / "t.jsonl", [row]), bad)
    assert (read.positives, read.negatives) == (("p",), ("n", "query p"))
    assert bad.texts == {"positive equals the query": 1, "negative equals the query or a positive": 2}
    assert bad.total == 0
    list(read_pairs(DataFile(path=str(tmp_path / "t.jsonl")), BadRows(), strict=True))


def test_punctuation_can_be_all_that_makes_a_negative(tmp_path: Path) -> None:
    row = {"query": "language of the kernel", "pos": ["C"], "neg": ["C++", "C#"]}
    assert pairs_of(written(tmp_path / "t.jsonl", [row]))[0].negatives == ("C++", "C#")


@given(st.text(), st.sampled_from(["", " ", "\n\t", "\u2003"]))
def test_folding_twice_is_folding_once_and_outer_space_does_not_matter(text: str, space: str) -> None:
    assert folded(folded(text)) == folded(text) == folded(space + text + space)


def test_a_second_reading_counts_nothing_twice(tmp_path: Path) -> None:
    rows = [bge("a"), "{", {"query": "q", "pos": "q"}, {"query": "b", "pos": "p", "neg": "b"}, "{", bge("c")]
    file, bad = DataFile(path=str(written(tmp_path / "t.jsonl", rows))), BadRows()
    for _, read in read_pairs(file, bad):
        if read.query == "b":
            break
    assert bad.rows == {"invalid JSON": 1, "positive equals the query": 1}
    for _ in range(3):
        assert [read.query for _, read in read_pairs(file, bad)] == ["a", "b", "c"]
    assert bad.rows == {"invalid JSON": 2, "positive equals the query": 1}
    assert bad.texts == {"negative equals the query or a positive": 1}


def test_the_report_has_the_reasons_by_number_and_the_first_rows(tmp_path: Path) -> None:
    bad = BadRows()
    path = written(tmp_path / "t.jsonl", [bge("a"), *["{"] * 20, {"query": "q"}, {"query": "b", "pos": "p", "neg": "b"}])
    assert len(pairs_of(path, bad)) == 2
    summary, *first = bad.report().splitlines()
    assert summary == (
        "21 rows left out (invalid JSON: 20, no positive: 1), 1 texts taken out of others (negative equals the query or a positive: 1)"
    )
    assert [line.split(": ")[0].strip() for line in first] == [f"{path}:{line}" for line in range(2, 12)]


def test_an_unknown_layout_is_refused_with_the_columns_and_the_layouts_that_are_known(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", ["{", {"text": "x", "pos": "y"}])
    message = (
        r"t\.jsonl:2: unknown layout with the columns text, pos; known are \{query, pos\[, neg\]\}; \{anchor, .*\{sentence1, sentence2\}"
    )
    with pytest.raises(DataError, match=message):
        pairs_of(path)
    with pytest.raises(DataError, match=message):
        is_scored(DataFile(path=str(path)))
    with pytest.raises(DataError, match=r"with the columns \(none\)"):
        pairs_of(written(path, [{}]))


@pytest.mark.parametrize("row", [BGE, {**SENTENCES, "label": 1}, SENTENCES])
def test_a_highest_score_for_rows_without_scores_is_refused(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"t\.jsonl: max_score=5 has no effect on rows \{"):
        pairs_of(written(tmp_path / "t.jsonl", [row]), max_score=5)


def test_a_file_without_rows_has_no_pairs_and_no_kind(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", ["", "{"])
    assert pairs_of(path) == []
    with pytest.raises(DataError, match=r"t\.jsonl: has no rows"):
        is_scored(DataFile(path=str(path)))


ROWS = [
    {"query": "q", "pos": ["p", "r"], "neg": ["n"], "prompt": "Find", "type": "symmetric_sts"},
    {"query": "zwei\u2028Zeilen\r\n", "pos": ["caf\u00e9 \U0001f600"], "neg": [], "prompt": None, "type": "asymmetric"},
    {"query": "x", "pos": [], "neg": None, "prompt": None, "type": None},
]


def test_every_format_gives_the_same_pairs(tmp_path: Path) -> None:
    expected = pairs_of(written(tmp_path / "t.jsonl", ROWS))
    assert [read.query for read in expected] == ["q", "zwei\u2028Zeilen\r\n"]
    assert expected == pairs_of(written(tmp_path / "t.jsonl.gz", ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet", row_group_size=1)
    bad = BadRows()
    assert expected == pairs_of(tmp_path / "t.parquet", bad)
    assert bad.examples == [f"{tmp_path / 't.parquet'}:3: no positive"]


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(bge(name)).encode() for name in "ab"))
    assert [read.query for read in pairs_of(path)] == ["a", "b"]


def test_columns_that_nobody_needs_are_not_read_from_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[str] = []
    read = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda file, **options: columns.extend(options["columns"]) or read(file, **options)
    )
    table = {"anchor": ["q"], "vector": [[1.0]], "positive": ["p"], "negative_1": ["n"], "negative_x": ["x"]}
    parquet.write_table(pa.table(table), tmp_path / "t.parquet")
    assert pairs_of(tmp_path / "t.parquet") == [pair("q", negatives=("n",))]
    assert columns == ["anchor", "positive", "negative_1"]


def test_a_table_of_unknown_layout_is_refused_even_if_it_is_empty(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: unknown layout with the columns text; known"):
        pairs_of(tmp_path / "t.parquet")


def test_a_folder_saved_by_datasets_gives_the_same_pairs(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path / "t"
    datasets.Dataset.from_list([{**row, "vector": [1.0]} for row in ROWS]).save_to_disk(str(folder))
    assert pairs_of(folder) == pairs_of(written(tmp_path / "t.jsonl", ROWS))


def test_a_folder_of_several_splits_is_refused_with_the_folder_of_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(ConfigurationError, match=r"holds the splits train, test; name the folder of one, such as .*t.train"):
        pairs_of(tmp_path / "t")
    assert len(pairs_of(tmp_path / "t" / "train")) == 2


def test_a_folder_that_datasets_did_not_save_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.raises(ConfigurationError, match="cannot be read as a folder written by save_to_disk"):
        pairs_of(tmp_path)


@pytest.mark.parametrize(("split", "expected"), [("", "train"), (":test", "test")])
def test_a_data_set_of_the_hub_is_streamed_from_the_split_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, expected: str
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked: list[tuple[str, str, bool]] = []

    def load(name: str, *, split: str, streaming: bool) -> object:
        asked.append((name, split, streaming))
        return datasets.Dataset.from_list([{**row, "vector": [1.0]} for row in ROWS]).to_iterable_dataset()

    columns: list[list[str]] = []
    select = datasets.IterableDataset.select_columns
    monkeypatch.setattr(datasets.IterableDataset, "select_columns", lambda table, names: columns.append(names) or select(table, names))
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert pairs_of(f"hf:owner/name{split}", name="t") == pairs_of(written(tmp_path / "t.jsonl", ROWS))
    assert asked == [("owner/name", expected, True)]
    assert columns == [list(ROWS[0])]


def test_a_streamed_data_set_that_does_not_tell_its_columns_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    table = datasets.IterableDataset.from_generator(lambda: iter([bge("a"), bge("b")]))
    assert table.column_names is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    assert [read.query for read in pairs_of("hf:owner/name")] == ["a", "b"]


def test_a_data_set_that_cannot_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def load(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigurationError, match="hf:owner/name: cannot be opened: no such data set"):
        pairs_of("hf:owner/name")


def test_without_its_library_the_message_has_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library, path in (("pyarrow", written(tmp_path / "t.parquet", [])), ("datasets", "hf:owner/name"), ("datasets", tmp_path)):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingExtraError, match=rf"{library} is .*pip install 'genembed\[train\]'"):
            pairs_of(path)


def test_what_is_no_data_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.jsonl: no such file"):
        pairs_of(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigurationError, match=r"file type '\.csv' is unknown; known are \.jsonl, \.jsonl\.gz, \.parquet, a folder"):
        pairs_of(written(tmp_path / "t.csv", []))
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet"):
        pairs_of(written(tmp_path / "t.parquet", ["PAR1 not really"]))


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-12], lambda content: b"plain", lambda content: content[:10] + b"\x07" + content[11:]]
)
def test_a_broken_gzip_file_is_an_error_and_not_a_short_file(tmp_path: Path, damage: Any) -> None:
    path = written(tmp_path / "t.jsonl.gz", [bge(str(number)) for number in range(1000)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"t\.jsonl\.gz: broken gzip after line \d+"):
        pairs_of(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for owner, opening in ((Path, "open"), (gzip, "open"), (parquet, "ParquetFile")):
        monkeypatch.setattr(owner, opening, refuse)
    (tmp_path / name).touch()
    with pytest.raises(ConfigurationError, match=rf"{name}: cannot be read: Permission denied\."):
        pairs_of(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "path='': the path of a file is needed"),
        ({"path": Path("x.jsonl")}, "path=.*: the path of a file is needed, as a string"),
        ({"name": " "}, "name=' ': it would say nothing"),
        ({"instruction": ""}, "instruction='': it would say nothing; give a text, or leave it out"),
        ({"weight": 0}, "weight=0: a number above 0 is needed; leave the file out"),
        ({"weight": float("inf")}, "weight=inf: a number above 0"),
        ({"weight": float("nan")}, "weight=nan: a number above 0"),
        ({"weight": None}, "weight=None: a number above 0"),
        ({"weight": True}, "weight=True: a number above 0"),
        ({"max_score": -5}, "max_score=-5: a number above 0 is needed, for example 5"),
        ({"symmetric": "yes"}, "symmetric='yes': True, False, or None"),
    ],
)
@pytest.mark.usefixtures("untyped_caller")
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DataFile(**{"path": "t.jsonl", **options})


@pytest.mark.parametrize(
    ("path", "source"),
    [("a/b.jsonl.gz", "b"), ("b.c.jsonl", "b.c"), ("b.parquet", "b"), ("a/folder", "folder"), ("hf:a/b:test", "a/b:test")],
)
def test_a_source_is_called_after_its_file(path: str, source: str) -> None:
    assert DataFile(path=path).source == source
    assert DataFile(path=path, name="mine").source == "mine"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    """7 MB of text, which a reader that holds all would hold as well."""
    path, text = tmp_path / f"t{suffix}", "word" * 6_000
    rows = ({"query": f"q{number}", "pos": [f"{number} {text}"], "neg": []} for number in range(300))
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=50)
    else:
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_pairs(DataFile(path=str(path)), BadRows())) == 300
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
