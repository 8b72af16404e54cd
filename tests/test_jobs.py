"""Corpus jobs: what is written, what is written once, and what happens when workers, disks and inputs fail."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from genembed import ConfigurationError, InputError, load
from genembed.errors import JobError
from genembed.jobs.encoder import Place
from genembed.jobs.folder import Description, JobFolder
from genembed.jobs.heartbeat import Reporter
from genembed.jobs.manifest import damage, finish
from genembed.jobs.model import ModelFactory
from genembed.jobs.run import Corpus, prepare, run_local
from genembed.jobs.status import Watch
from genembed.jobs.storage import commit
from genembed.jobs.work import Worker
from stub_encoder import DIMENSIONS, Stub, vector_of

TEXTS = [f"text {'x' * (number % 60)} {number}" for number in range(23)]


def write_rows(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    path.write_text("".join(f"{json.dumps({'id': f'd{number}', 'text': text})}\n" for number, text in enumerate(texts)))
    return path


def corpus(*inputs: Path, shard_rows: int = 10) -> Corpus:
    return Corpus(inputs=[str(path) for path in inputs], id_column="id", shard_rows=shard_rows)


def description(stub: Stub | None = None, *, max_rejects: int = 5, output: str = "parquet") -> Description:
    identity = (stub or Stub())(Place()).identity
    return Description(identity=identity, origin={"model": "stub"}, max_rejects=max_rejects, output=output)


def embed(root: Path, source: Path, stub: Stub | None = None, *, workers: int = 1, **options: Any) -> dict[str, Any]:
    folder = JobFolder(root)
    prepare(folder, corpus(source), description(stub, **options))
    return run_local(folder, stub or Stub(), workers=workers)


def rows_of(root: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((root / "shards").glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def bytes_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def unbroken(tmp_path: Path, source: Path) -> dict[str, bytes]:
    embed(tmp_path / "unbroken", source)
    return bytes_of(tmp_path / "unbroken")


def test_each_row_has_its_own_vector_in_the_order_of_the_input(tmp_path: Path, source: Path) -> None:
    manifest = embed(tmp_path / "out", source)
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"d{number}" for number in range(23)]
    assert [row["vector"] for row in rows] == [vector_of(text).tolist() for text in TEXTS]
    assert [row["steps"] for row in rows] == [len(text) % 7 for text in TEXTS]
    assert [row["truncated"] for row in rows] == [len(text) > 50 for text in TEXTS]
    assert [shard["rows"] for shard in manifest["shards"]] == [10, 10, 3]
    assert manifest["mean_steps"] == sum(len(text) % 7 for text in TEXTS) / 23


def test_the_columns_are_plain_and_the_vector_is_a_list_of_fixed_size(tmp_path: Path, source: Path) -> None:
    embed(tmp_path / "out", source)
    schema = parquet.read_schema(tmp_path / "out" / "shards" / "000000.parquet")
    vector = pyarrow.list_(pyarrow.float32(), DIMENSIONS)
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "id": pyarrow.string(),
        "vector": vector,
        "steps": pyarrow.int32(),
        "truncated": pyarrow.bool_(),
    }
    assert schema.metadata is None


def test_a_real_model_writes_what_encode_returns(tmp_path: Path, source: Path, folder_of: Callable[[str], Path]) -> None:
    factory = ModelFactory(model=str(folder_of("bert")), weights="float64")
    folder = JobFolder(tmp_path / "out")
    prepare(folder, corpus(source), Description(identity=factory.identity(), origin=factory.origin(), max_rejects=0, output="parquet"))
    run_local(folder, factory)
    embedder = load(folder_of("bert"), dtype="float64")
    done = embedder.refine(TEXTS, instruction=embedder.settings.document_instruction)
    rows = rows_of(folder.root)
    np.testing.assert_allclose(np.stack([row["vector"] for row in rows]), done.vectors, atol=1e-7)
    assert [row["steps"] for row in rows] == done.steps.tolist()


def test_half_precision_is_written_as_such_and_untrained_dimensions_are_refused(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    half = ModelFactory(model=str(folder_of("bert")), dtype="float16")(Place())
    assert half(["one", "two"]).vectors.dtype == np.float16
    with pytest.raises(ConfigurationError, match=r"truncate_dim=7: this model was not trained to give fewer than 32"):
        ModelFactory(model=str(folder_of("bert")), dims=7)(Place())


def test_a_job_that_is_finished_embeds_nothing_again(tmp_path: Path, source: Path) -> None:
    log = tmp_path / "log"
    first = embed(tmp_path / "out", source, Stub(log=log))
    before = bytes_of(tmp_path / "out")
    assert embed(tmp_path / "out", source, Stub(log=log)) == first
    assert bytes_of(tmp_path / "out") == before
    assert sorted(log.read_text().splitlines()) == sorted(TEXTS)


def test_only_what_is_missing_is_made_again_and_the_bytes_are_those_of_an_unbroken_run(
    tmp_path: Path, source: Path, unbroken: dict[str, bytes]
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    prepare(JobFolder(out), corpus(source), description())
    Worker(JobFolder(out), Stub(), Place()).make(1)
    (out / "shards" / ".tmp-000000.parquet-99-0").write_bytes(b"half a shard of a killed worker")
    (out / "shards" / "000002.parquet").write_bytes(b"a shard without a receipt")
    embed(out, source, Stub(log=log))
    assert sorted(log.read_text().splitlines()) == sorted([*TEXTS[:10], *TEXTS[20:]])
    assert bytes_of(out) == unbroken


def test_several_processes_make_the_same_bytes(tmp_path: Path, source: Path, unbroken: dict[str, bytes]) -> None:
    embed(tmp_path / "out", source, workers=2)
    assert bytes_of(tmp_path / "out") == unbroken


def test_two_workers_that_race_make_each_shard_once(tmp_path: Path, source: Path, unbroken: dict[str, bytes]) -> None:
    folder, log = JobFolder(tmp_path / "out"), tmp_path / "log"
    prepare(folder, corpus(source), description())
    stub = Stub(log=log, seconds=0.02)
    workers = [threading.Thread(target=Worker(folder, stub, Place()).run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    finish(folder)
    assert sorted(log.read_text().splitlines()) == sorted(TEXTS)
    assert bytes_of(folder.root) == unbroken


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*TEXTS, "die here once"])
    manifest = embed(tmp_path / "out", source, Stub(mercy=tmp_path / "mercy"), workers=2)
    assert manifest["rows"] == 24
    assert (tmp_path / "mercy").exists()


def test_workers_that_die_again_and_again_end_the_job(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ["die here always"])
    with pytest.raises(JobError, match=r"4 workers died without finishing a shard, the last one of signal 9; .* use fewer workers"):
        embed(tmp_path / "out", source, workers=2)


def test_what_a_worker_refuses_in_its_process_is_what_the_job_says(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ["refuse"] * 7)
    with pytest.raises(JobError, match=r"7 rows cannot be embedded, more than --max-rejects 5"):
        embed(tmp_path / "out", source, workers=2)


def test_a_row_that_cannot_be_embedded_is_told_apart_with_its_reason(tmp_path: Path) -> None:
    texts = [*TEXTS[:3], "refuse this", *TEXTS[3:12], "explode now"]
    source = write_rows(tmp_path / "rows.jsonl", texts)
    with source.open("ab") as file:
        file.write(b'not JSON\n["a list"]\n{"id": "n", "text": null}\n{"id": "u", "text": "\\ud800"}\n')
        file.write(b'\n{"id": "b", "text": "\xff"}\n{"text": "no id"}\n')
    manifest = embed(tmp_path / "out", source, max_rejects=8)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(line["number"], line["id"], line["place"].rsplit(", ", 1)[1]) for line in lines] == [
        (3, "d3", "line 4"),
        (13, "d13", "line 14"),
        (14, None, "line 15"),
        (15, None, "line 16"),
        (16, None, "line 17"),
        (17, "u", "line 18"),
        (18, None, "line 20"),
        (19, None, "line 21"),
    ]
    reasons = [line["reason"] for line in lines]
    assert reasons[:4] == [
        "no such text, please",
        "the vector is not finite",
        "invalid JSON at character 1: Expecting value.",
        'expected an object such as {"text": "..."}, got \'["a list"]\'',
    ]
    assert "column 'text' holds None" in reasons[4]
    assert "lone surrogates" in reasons[5]
    assert reasons[6] == "byte 22 (0xff) is not UTF-8."
    assert reasons[7] == "no column 'id'; there are: text. Name one with --columns."
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["d0", "d1", "d2", *(f"d{number}" for number in range(4, 13))]
    assert (manifest["rows"], manifest["rejects"]) == (12, 8)


def test_a_shard_of_nothing_but_rejects_is_an_empty_file_of_the_same_columns(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ["fine", *["refuse"] * 5])
    folder = JobFolder(tmp_path / "out")
    prepare(folder, corpus(source, shard_rows=3), description())
    run_local(folder, Stub())
    one, two = (parquet.read_schema(folder.shard_file(index)) for index in (0, 1))
    assert one == two
    assert parquet.read_metadata(folder.shard_file(1)).num_rows == 0


def test_too_many_rejects_stop_the_job_and_more_may_be_allowed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*TEXTS[:10], *["refuse"] * 6])
    with pytest.raises(JobError, match=r"6 rows .* --max-rejects 5, .*rows.jsonl, line 11: no such text, please; .*line 12"):
        embed(tmp_path / "out", source)
    assert not (tmp_path / "out" / "receipts" / "000001.json").exists()
    assert embed(tmp_path / "out", source, max_rejects=6)["rejects"] == 6


def test_rejects_of_all_shards_count_together(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*["refuse"] * 3, *TEXTS[:10], *["refuse"] * 3])
    with pytest.raises(JobError, match=r"6 rows cannot be embedded"):
        embed(tmp_path / "out", source)
    assert [path.name for path in (tmp_path / "out" / "receipts").iterdir()] == ["000000.json"]


def test_a_worker_that_has_waited_for_another_one_does_not_make_its_shard_again(tmp_path: Path, source: Path) -> None:
    folder, log = JobFolder(tmp_path / "out"), tmp_path / "log"
    prepare(folder, corpus(source), description())
    workers = [threading.Thread(target=Worker(folder, Stub(log=log, seconds=0.3), Place()).make, args=(0,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(log.read_text().splitlines()) == sorted(TEXTS[:10])


def test_a_changed_input_is_refused_and_a_touched_one_is_not(tmp_path: Path, source: Path) -> None:
    embed(tmp_path / "out", source)
    os.utime(source, (1, 1))
    embed(tmp_path / "out", source)
    source.write_text(source.read_text().replace("text  0", "text  9"))
    with pytest.raises(ConfigurationError, match=r"rows.jsonl has changed"):
        embed(tmp_path / "out", source)
    other = write_rows(tmp_path / "more.jsonl")
    with pytest.raises(ConfigurationError, match=r"more.jsonl is new in the input|rows.jsonl is not among the input any more"):
        embed(tmp_path / "out", other)


def test_rows_that_change_while_the_job_runs_are_never_embedded(tmp_path: Path, source: Path) -> None:
    folder = JobFolder(tmp_path / "out")
    prepare(folder, corpus(source), description())
    source.write_text(source.read_text().replace("text xxxxxxxxxxxx 12", "text xxxxxxxxxxxy 12"))
    with pytest.raises(JobError, match=r"shard 1: .*rows.jsonl no longer holds the rows"):
        run_local(folder, Stub())
    assert folder.receipt_file(0).exists()
    assert not folder.receipt_file(1).exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "other"}, r"started with model='stub', and this is 'other'"),
        ({"shard_rows": 5}, r"started with shard rows 10, and this is 5"),
        ({"id_column": None}, r"started with id column id, and this is None"),
        ({"output": "lance"}, r"started with output parquet, and this is lance"),
    ],
)
def test_another_model_or_cut_is_refused(tmp_path: Path, source: Path, changed: dict[str, Any], words: str) -> None:
    embed(tmp_path / "out", source)
    stub = Stub(name=changed.pop("name", "stub"))
    output = changed.pop("output", "parquet")
    given = Corpus(**{"inputs": [str(source)], "id_column": "id", "shard_rows": 10, **changed})
    with pytest.raises(ConfigurationError, match=words):
        prepare(JobFolder(tmp_path / "out"), given, description(stub, output=output))


def test_a_worker_with_another_model_than_the_jobs_does_not_begin(tmp_path: Path, source: Path) -> None:
    prepare(JobFolder(tmp_path / "out"), corpus(source), description())
    with pytest.raises(ConfigurationError, match="its rows would not compare"):
        Worker(JobFolder(tmp_path / "out"), Stub(name="other"), Place())


def test_a_job_is_not_put_where_something_else_is(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ConfigurationError, match="with other things in it"):
        embed(tmp_path, source)
    with pytest.raises(ConfigurationError, match="object stores cannot"):
        prepare(JobFolder(Path("s3://bucket/out")), corpus(source), description())
    embed(tmp_path / "out", source)
    with pytest.raises(ConfigurationError, match="there is a job already"):
        prepare(JobFolder(tmp_path / "out"), corpus(source), description(), resume=False)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty.jsonl: there are no rows"):
        embed(tmp_path / "none", tmp_path / "empty.jsonl")


Call = Callable[..., Any]


def full_disk(real: Call) -> Call:
    def write(descriptor: int, content: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    return write


def broken_disk(real: Call) -> Call:
    def write(descriptor: int, content: memoryview) -> int:
        raise OSError(errno.EIO, "Input/output error")

    return write


def forgetful_disk(real: Call) -> Call:
    def write(descriptor: int, content: memoryview) -> int:
        real(descriptor, content[: len(content) // 2])
        return len(content)  # and says that it has taken all

    return write


def flipping_disk(real: Call) -> Call:
    def write(descriptor: int, content: memoryview) -> int:
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 4
        return int(real(descriptor, bytes(flipped)))

    return write


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        (full_disk, "the disk is full"),
        (broken_disk, "input/output error"),
        (forgetful_disk, "reads back otherwise"),
        (flipping_disk, "reads back otherwise"),
    ],
)
@pytest.mark.parametrize("write", range(4))
def test_a_failing_disk_is_named_and_nothing_of_it_stays(
    tmp_path: Path, source: Path, unbroken: dict[str, bytes], disk: Callable[[Call], Call], reason: str, write: int
) -> None:
    """Writes 0 and 2 are shards, 1 and 3 their receipts."""
    folder = JobFolder(tmp_path / "out")
    prepare(folder, corpus(source), description())
    real, writes = os.write, iter(range(100))

    def sometimes(descriptor: int, content: memoryview) -> int:
        fails = isinstance(content, memoryview) and next(writes) == write  # nobody else writes those
        return int((disk(real) if fails else real)(descriptor, content))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", sometimes)
        with pytest.raises(JobError, match=rf"00000{write // 2}\.(parquet|json).*{reason}"):
            run_local(folder, Stub())
    assert not list(folder.root.rglob(".tmp-*"))
    assert {path.name for path in folder.receipts.iterdir()} == {f"{index:06d}.json" for index in range(write // 2)}
    run_local(folder, Stub())
    assert bytes_of(folder.root) == unbroken


def test_a_disk_that_takes_a_part_at_a_time_gets_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:7]))
    commit(tmp_path / "file", b"more than seven bytes")
    assert (tmp_path / "file").read_bytes() == b"more than seven bytes"


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*TEXTS, "refuse"])
    embed(tmp_path / "out", source)
    folder = JobFolder(tmp_path / "out")
    assert list(damage(folder)) == []
    flipped = bytearray(folder.shard_file(1).read_bytes())
    flipped[100] ^= 1
    folder.shard_file(1).write_bytes(flipped)
    folder.shard_file(0).unlink()
    folder.rejects_file(2).write_text("")
    manifest = json.loads(folder.manifest.read_text())
    folder.manifest.write_text(json.dumps({**manifest, "rows": 99}))
    assert [line.removeprefix(f"{folder.root}/") for line in damage(folder)] == [
        "shards/000000.parquet: is missing",
        "shards/000001.parquet: its bytes are not those that were written",
        "rejects/000002.jsonl: its bytes are not those that were written",
        "manifest.json: does not say what the receipts say",
    ]


def test_a_shard_that_is_lost_before_the_end_is_named(tmp_path: Path, source: Path) -> None:
    folder = JobFolder(tmp_path / "out")
    prepare(folder, corpus(source), description())
    Worker(folder, Stub(), Place()).run()
    folder.shard_file(1).write_bytes(b"short")
    with pytest.raises(JobError, match=r"000001.parquet: has 5 bytes, .* delete .*000001.json"):
        finish(folder)
    folder.receipt_file(1).unlink()
    assert run_local(folder, Stub())["rows"] == 23


def test_the_state_is_read_while_others_work(tmp_path: Path, source: Path) -> None:
    folder = JobFolder(tmp_path / "out")
    plan = prepare(folder, corpus(source), description())
    watch = Watch(folder, plan)
    assert (watch.status().done, watch.status().seconds_left) == (0, None)
    worker = threading.Thread(target=Worker(folder, Stub(seconds=0.15), Place()).run)
    worker.start()
    seen = [watch.status() for _ in iter(lambda: worker.join(0.01) or worker.is_alive(), False)]
    assert {0, 10, 20} <= {status.done for status in seen}
    busy = [status for status in seen if status.rows_per_second]
    assert busy[-1].workers == 1
    assert 10 < busy[-1].rows_per_second < 10 / 0.15
    assert busy[-1].seconds_left == (23 - busy[-1].done - busy[-1].in_work) / busy[-1].rows_per_second
    assert not watch.status().complete
    finish(folder)
    assert (watch.status().complete, watch.status().done, watch.status().workers) == (True, 23, 0)


def test_rows_of_a_shard_that_is_not_safe_yet_are_told_apart(tmp_path: Path, source: Path) -> None:
    folder = JobFolder(tmp_path / "out")
    plan = prepare(folder, corpus(source), description())
    reporter, watch = Reporter(folder, 0), Watch(folder, plan)
    reporter.begin(1)
    reporter.advance(Stub()(Place())(TEXTS[:6]), 2)
    reporter.end()
    reporter.begin(1)
    reporter.state.shard_rows, reporter.state.shard_rejects = 8, 2
    reporter._said = 0.0
    reporter.advance(Stub()(Place())([]), 0)
    status = watch.status()
    assert (status.done, status.in_work, status.rejects) == (0, 8, 2)
    Worker(folder, Stub(), Place()).make(1)
    assert (watch.status().done, watch.status().in_work) == (10, 0)


def test_a_worker_does_not_mind_that_another_has_finished_and_cleared_away(tmp_path: Path, source: Path) -> None:
    folder = JobFolder(tmp_path / "out")
    prepare(folder, corpus(source), description())
    reporter = Reporter(folder, 0)
    reporter.begin(2)
    run_local(folder, Stub())
    assert not folder.workers.exists()
    reporter.end()
    reporter.close()
    assert not folder.workers.exists()


def test_a_lance_dataset_holds_the_rows_of_all_shards(tmp_path: Path, source: Path) -> None:
    import lancedb

    embed(tmp_path / "out", source, output="lance")
    rows = lancedb.connect(tmp_path / "out").open_table("vectors").to_arrow().to_pylist()
    assert rows == rows_of(tmp_path / "out")
