"""Files from outside, made up and changed at random: whatever they hold, they are read, or refused by one of our errors."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genembed import GenembedError
from genembed.calibrate.certificate import read_rule
from genembed.files import read_texts
from genembed.halting import rule_from_json
from genembed.jobs.folder import JobFolder
from genembed.jobs.heartbeat import heartbeats
from genembed.jobs.plan import Plan
from genembed.jobs.work import check_identity
from genembed.precision import ranges_from_json
from genembed.settings import CAUSAL_EOS, GIRCSE, LASER, ModelSettings
from genembed.source import read_json

pytestmark = pytest.mark.usefixtures("untyped_caller")  # a file's values have any type

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([10**30, "\0", "\ud800", "1e999"])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)


def changed(sound: Any) -> st.SearchStrategy[Any]:
    """Return a JSON value in which one part, at any depth, is another value, is missing, or has company; the rest is sound."""
    if isinstance(sound, dict) and sound:
        keys = st.sampled_from(sorted(sound))
        other = keys.flatmap(lambda key: changed(sound[key]).map(lambda value: {**sound, key: value}))
        fewer = keys.map(lambda key: {name: value for name, value in sound.items() if name != key})
        more = st.dictionaries(st.text(max_size=8), JSON, min_size=1, max_size=2).map(lambda own: {**sound, **own})
        return st.one_of(other, other, other, fewer, more, JSON)
    if isinstance(sound, list) and sound:
        places = st.sampled_from(range(len(sound)))
        other = places.flatmap(lambda place: changed(sound[place]).map(lambda value: [*sound[:place], value, *sound[place + 1 :]]))
        return st.one_of(other, st.just(sound[1:]), st.just(sound * 3), JSON)
    return JSON


def read_or_refused(read: Callable[[], object]) -> None:
    with contextlib.suppress(GenembedError):
        read()


@given(st.sampled_from([GIRCSE, LASER, CAUSAL_EOS]).map(ModelSettings.to_json).map(json.dumps).map(json.loads).flatmap(changed))
@settings(max_examples=100)
def test_settings_are_read_or_refused(value: Any) -> None:
    if isinstance(value, dict):
        read_or_refused(lambda: ModelSettings.from_json(value, source="genembed.json"))


@given(
    st.fixed_dictionaries(
        {"rule": st.sampled_from(["FixedSteps", "ConvergeStop"]) | JSON}, optional={"steps": JSON, "threshold": JSON, "patience": JSON}
    )
)
@settings(max_examples=100)
def test_halting_rules_are_read_or_refused(value: Any) -> None:
    read_or_refused(lambda: rule_from_json(value))


@given(changed({"format_version": 1, "dimensions": {"2": {"minimum": [-0.5, -0.25], "maximum": [0.5, 0.25]}}}))
@settings(max_examples=150)
def test_ranges_are_read_or_refused(value: Any) -> None:
    if isinstance(value, dict):
        read_or_refused(lambda: ranges_from_json(value, source="ranges.json"))


FILES = {
    "size": 5,
    "identity": "x",
    "url": "/a.jsonl",
    "file_format": "jsonl",
}
SPAN = {"file": 0, "start": 0, "stop": 5, "line": 1, "rows": 1}
PLAN = {
    "format_version": 1,
    "files": [FILES],
    "hashes": ["x"],
    "headers": [[]],
    "columns": {"text": "text", "id": None, "option": None},
    "shard_rows": 1,
    "shards": [{"index": 0, "first_row": 0, "rows": 1, "spans": [SPAN], "sha256": "x"}],
}


@given(changed(PLAN))
@settings(max_examples=150)
def test_plans_of_jobs_are_read_or_refused(value: Any) -> None:
    if isinstance(value, dict):
        read_or_refused(lambda: Plan.from_json(value))


RECEIPT = {
    **{"shard": 0, "rows": 1, "rejects": 0, "bytes": 5, "sha256": "x", "rejects_sha256": None, "steps": 3, "tokens": 4, "truncated": 0},
}
DESCRIPTION = {"format_version": 1, "identity": {"model": "x"}, "origin": {}, "max_rejects": 0, "output": "parquet"}


BEAT = {**{"host": "here", "process": 1, "worker": 0, "started": 1.0, "updated": 1.0, "busy_seconds": 0.0}, "rows": 0, "shard": None}


@given(changed(RECEIPT), changed(DESCRIPTION), changed(BEAT))
@settings(max_examples=100)
def test_what_a_jobs_folder_holds_is_read_or_refused(tmp_path: Path, receipt: Any, description: Any, beat: Any) -> None:
    folder = JobFolder(tmp_path / "job")
    folder.make()
    folder.receipt_file(0).write_text(json.dumps(receipt))
    folder.job.write_text(json.dumps(description))
    (folder.workers / "x.json").write_text(json.dumps(beat))
    folder.rejects_file(0).write_text(json.dumps(receipt)[:-1] + json.dumps(beat))
    read_or_refused(lambda: folder.read_receipt(0))
    read_or_refused(lambda: [*folder.read_rejects(0)])
    read_or_refused(lambda: check_identity(folder.read_description(), {"model": "x"}))
    read_or_refused(lambda: [one.rows + one.steps for one in heartbeats(folder)])


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150)
def test_any_bytes_of_a_json_file_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    read_or_refused(lambda: read_json(tmp_path / "file.json"))
    read_or_refused(lambda: read_rule(tmp_path / "file.json"))


LINES = st.lists(
    st.just('{"text": 1' + "0" * 5_000 + "}")
    | JSON.map(json.dumps)
    | st.text(max_size=30)
    | st.builds(json.dumps, st.fixed_dictionaries({"text": SCALARS})),
    max_size=5,
)


def _csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([["text", "id"], *rows])
    return text.getvalue().encode("utf-8", "surrogatepass")


@given(
    st.binary(max_size=300)
    | LINES.map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(st.lists(st.text(max_size=10), min_size=1, max_size=3), max_size=4).map(_csv)
)
@settings(max_examples=100)
def test_any_bytes_of_a_file_of_texts_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    for suffix in ("txt", "jsonl", "csv", "parquet"):
        path = tmp_path / f"texts.{suffix}"
        path.write_bytes(content)
        read_or_refused(lambda path=path: list(read_texts(path)))  # type: ignore[misc]
        read_or_refused(lambda path=path: list(read_texts(path, id_column="id")) if path.suffix != ".txt" else None)  # type: ignore[misc]


def _mutations(content: bytes) -> Iterator[bytes]:
    for place in range(0, len(content), max(1, len(content) // 40)):
        for change in (b"", b"\0", b"\xff" * 4, b'"', content[place : place + 1] * 30):
            yield content[:place] + change + content[place + 1 :]


def test_a_parquet_file_of_texts_that_is_changed_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["a", "b" * 50], "id": [1, 2]}), sink)
    for content in _mutations(sink.getvalue().to_pybytes()):
        (tmp_path / "texts.parquet").write_bytes(content)
        read_or_refused(lambda: list(read_texts(tmp_path / "texts.parquet")))
