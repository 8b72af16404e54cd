"""Retrieval sets: read as BEIR lays them out, and every flaw named with its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from genembed import GenembedWarning
from genembed.errors import DataError
from genembed.testsets import read_retrieval_set, retrieval_files

HEADER = "query-id\tcorpus-id\tscore\n"


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    corpus = written(tmp_path / "corpus.jsonl", {"_id": "d1", "title": "A", "text": "one"}, {"_id": "d2", "title": "", "text": "two"})
    queries = written(tmp_path / "queries.jsonl", {"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"})
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text(HEADER + "q1\td1\t2\nq1\td2\t0\nq2\td2\t1\n")
    return corpus, queries, qrels


def test_texts_have_their_titles_first_and_grades_of_zero_are_no_answers(files: tuple[Path, Path, Path]) -> None:
    data = read_retrieval_set(*files)
    assert data.documents == {"d1": "A one", "d2": "two"}
    assert data.queries == {"q1": "first", "q2": "second"}
    assert data.relevant == {"q1": {"d1": 2}, "q2": {"d2": 1}}


def test_without_judgements_every_query_counts(files: tuple[Path, Path, Path]) -> None:
    data = read_retrieval_set(files[0], files[1])
    assert (list(data.queries), data.relevant) == (["q1", "q2"], None)


def test_trec_columns_gzip_and_windows_line_ends_are_read(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(files[0].read_bytes().replace(b"\n", b"\r\n")))
    files[2].write_text("q1 0 d1 2\nq2 0 d2 1\n")
    again = read_retrieval_set(packed, files[1], files[2])
    assert again.relevant == {"q1": {"d1": 2}, "q2": {"d2": 1}}
    assert again.fingerprint == read_retrieval_set(*files).fingerprint


def test_the_fingerprint_changes_with_any_text(files: tuple[Path, Path, Path]) -> None:
    before = read_retrieval_set(*files).fingerprint
    files[0].write_text(files[0].read_text().replace("two", "two."))
    assert read_retrieval_set(*files).fingerprint != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q9\td1\t1", "names 1 queries that are not there (q9)"),
        ("q2\td9\t1", "names 1 documents that are not there (d9)"),
    ],
)
def test_judgements_of_strangers_are_counted_and_left_out(files: tuple[Path, Path, Path], line: str, message: str) -> None:
    files[2].write_text(files[2].read_text() + line + "\n")
    with pytest.warns(GenembedWarning) as warned:
        data = read_retrieval_set(*files)
    assert message in str(warned[0].message)
    assert data.relevant == {"q1": {"d1": 2}, "q2": {"d2": 1}}


def test_queries_without_an_answer_are_counted_and_left_out(files: tuple[Path, Path, Path]) -> None:
    files[2].write_text(HEADER + "q1\td1\t1\nq2\td2\t0\n")
    with pytest.warns(GenembedWarning, match=r"1 of 2 queries have no relevant document and are left out \(q2\)"):
        data = read_retrieval_set(*files)
    assert list(data.queries) == ["q1"]


@pytest.mark.parametrize(
    ("which", "content", "message"),
    [
        (0, "", r"corpus\.jsonl: is empty"),
        (0, '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n', r"corpus\.jsonl, line 2: the id 'd1' occurs a second time"),
        (0, '{"_id": "d1"}\n', r"corpus\.jsonl, line 1: an object with _id and text is needed"),
        (0, '{"_id": true, "text": "a"}\n', r"corpus\.jsonl, line 1: an object with _id and text is needed"),
        (0, "[1]\n", r"corpus\.jsonl, line 1: an object"),
        (1, "\n{broken\n", r"queries\.jsonl, line 2: not JSON"),
        (2, f"{HEADER}q1\td1\tnan\n", r"qrels\.tsv, line 2: the score 'nan' is not a whole number"),
        (2, f"{HEADER}q1\td1\t0.5\n", r"qrels\.tsv, line 2: the score '0\.5' is not a whole number"),
        (2, f"{HEADER}q1\td1\tyes\n", r"qrels\.tsv, line 2: the score 'yes'"),
        (2, f"{HEADER}q1\td1\n", r"qrels\.tsv, line 2: query, document and score are needed"),
        (2, f"{HEADER}q1\td1\t1\nq1\td1\t2\n", r"qrels\.tsv, line 3: query 'q1' and document 'd1' are judged a second time"),
        (2, f"{HEADER}q1\td1\t0\n", r"no query of .*queries\.jsonl has a relevant document"),
    ],
)
def test_a_flaw_is_named_with_its_file_and_line(files: tuple[Path, Path, Path], which: int, content: str, message: str) -> None:
    files[which].write_text(content)
    with pytest.raises(DataError, match=message):
        read_retrieval_set(*files)


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b""])
def test_what_is_no_text_or_not_there_is_refused(files: tuple[Path, Path, Path], tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "other.jsonl.gz"
    if damage:
        path.write_bytes(damage)
    with pytest.raises(DataError, match=r"other\.jsonl\.gz: cannot be read"):
        read_retrieval_set(path, files[1])


def test_the_reference_sets_are_read_whole(shared: Path) -> None:
    folder = shared / "data" / "retrieval" / "fiqa_mini"
    data = read_retrieval_set(folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels.tsv")
    assert (len(data.documents), len(data.queries)) == (648, 648)


def test_the_files_of_a_folder_are_found_by_their_split(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert retrieval_files(tmp_path) == files
    train = written(tmp_path / "qrels_train.tsv")
    assert retrieval_files(tmp_path, split="train") == (*files[:2], train)
    (tmp_path / "qrels").mkdir()
    test = written(tmp_path / "qrels" / "test.tsv")
    assert retrieval_files(tmp_path) == (*files[:2], test)
    packed = files[0].rename(tmp_path / "corpus.jsonl.gz")
    assert retrieval_files(tmp_path) == (packed, files[1], test)


def test_files_of_a_folder_that_are_missing_are_named(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qrels/dev\.tsv or qrels_dev\.tsv is missing"):
        retrieval_files(tmp_path, split="dev")
    assert retrieval_files(tmp_path, split="dev", judged=False) == (*files[:2], None)
    files[1].unlink()
    with pytest.raises(DataError, match=r"queries\.jsonl or queries\.jsonl\.gz is missing"):
        retrieval_files(tmp_path, judged=False)
