"""`genembed job`: what the verbs print and refuse, as a user gives them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from genembed import load
from genembed.cost import Cost, Shape
from genembed.jobs.forecast import DEVICES, counted_rate
from test_cli import Run, refused, run

__all__ = ["run"]  # the fixture

TEXTS = ["a stitch in time", "the language of models", "business trips", "fasting glucose"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps({'key': f'k{n}', 'body': text})}\n" for n, text in enumerate(TEXTS)))
    return tmp_path


def test_a_corpus_becomes_shards_and_the_folder_tells_what_it_holds(place: Path, run: Run, folder_of: Callable[[str], Path]) -> None:
    model = folder_of("bert")
    options = ("rows.jsonl", "-o", "out", "-m", model, "--columns", "key,body", "--shard-rows", 3, "--steps", 2)
    assert run("job", "embed", *options).out.startswith("out: 4 rows in 2 shards, 2.00 steps on average, ")
    rows = [row for path in sorted((place / "out" / "shards").iterdir()) for row in parquet.read_table(path).to_pylist()]
    assert [row["id"] for row in rows] == ["k0", "k1", "k2", "k3"]
    np.testing.assert_allclose([row["vector"] for row in rows], load(model).encode_document(TEXTS, steps=2), atol=1e-6)
    status = run("job", "status", "out", "--json", "--prometheus", "job.prom").json
    assert (status["complete"], status["done"], status["shards_done"], status["seconds_left"]) == (True, 4, 2, 0.0)
    assert "genembed_job_rows 4.0" in (place / "job.prom").read_text()
    assert "rows          4 safe, 0 in work, of 4 (100.0 %)" in run("job", "status", "out").out
    assert run("job", "verify", "out").out == "out: every file is what was written.\n"
    assert run("job", "embed", *options, "--json").json["rows"] == 4
    refused(run("job", "embed", *options, "--no-resume"), "there is a job already")
    refused(run("job", "embed", *options[:-1], 3), "started with halt='FixedSteps(steps=2)', and this is 'FixedSteps(steps=3)'")


def test_a_finished_job_becomes_an_index_without_embedding_again(
    place: Path, run: Run, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "model").mkdir()
    model = Path(shutil.copytree(folder_of("bert"), place / "model", dirs_exist_ok=True))
    (place / "rows.jsonl").write_text((place / "rows.jsonl").read_text() + '{"key": "x", "body": null}\n')
    options = ("-m", model, "--columns", "key,body", "--shard-rows", 2, "--dtype", "float16", "--steps", 2)
    run("job", "embed", "rows.jsonl", "-o", "out", *options)
    with monkeypatch.context() as patch:
        patch.setattr("genembed.engine.Engine.run", None)
        assert run("index", "--from-shards", "out", "-o", "x").out == "x: 4 passages of 32 dimensions\n"
        assert run("index", "--from-shards", "out", "-o", "x", "--update").out == "x: 0 passages added, 4 there before, 4 now\n"
        refused(run("index", "rows.jsonl", "--from-shards", "out", "-o", "y"), "leave paths and other options out")
    hit = run("search", "x", TEXTS[2], "-k", 1, "--steps", 2, "--json").json["hits"][0]
    assert (hit["reference"], hit["text"]) == ("k2", TEXTS[2])
    assert hit["score"] > 0.999
    more = ("more.jsonl", "-o", "more", "-m", model, "--columns", "key,body", "--steps", 2)
    (place / "more.jsonl").write_text(json.dumps({"key": "new", "body": "slow trains"}) + "\n")
    run("job", "embed", *more)
    assert run("index", "--from-shards", "more", "-o", "x", "--update").out == "x: 1 passages added, 0 there before, 5 now\n"
    (place / "more" / "manifest.json").unlink()
    refused(run("index", "--from-shards", "more", "-o", "z"), "the job is not finished")
    (model / "genembed.json").write_text((model / "genembed.json").read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    refused(run("index", "--from-shards", "out", "-o", "z"), "has changed since the job")


def test_a_flipped_bit_is_found_by_verify(place: Path, run: Run, folder_of: Callable[[str], Path]) -> None:
    run("job", "embed", "rows.jsonl", "-o", "out", "-m", folder_of("bert"), "--columns", "body", "--steps", 0)
    shard = place / "out" / "shards" / "000000.parquet"
    content = bytearray(shard.read_bytes())
    content[90] ^= 1
    shard.write_bytes(content)
    refused(run("job", "verify", "out"), "000000.parquet: its bytes are not those that were written. Delete the receipts")


def test_a_file_says_what_the_options_say(place: Path, run: Run, folder_of: Callable[[str], Path]) -> None:
    (place / "job.toml").write_text(
        f'inputs = ["rows.jsonl"]\nout = "out"\nmodel = "{folder_of("bert")}"\n'
        'columns = "body"\nshard-rows = 2\nsteps = 1\ndtype = "float16"\n'
    )
    assert run("job", "run", "job.toml").out.startswith("out: 4 rows in 2 shards, 1.00 steps on average")
    assert (
        str(parquet.read_schema(place / "out" / "shards" / "000000.parquet").field("vector").type)
        == "fixed_size_list<element: halffloat>[32]"
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ('inputs = ["rows.jsonl"]\nout = "x"\nshards = 3\n', "job.toml: No such option: --shards"),
        ('out = "x"\n', 'needs inputs = ["rows.jsonl"] and out = "vectors"'),
        ('inputs = ["rows.jsonl"]\nout = "x"\nworkers = "two"\n', "job.toml: Invalid value for '--workers'"),
        ('inputs = ["rows.jsonl"]\nout = "x"\nnum-gpus = 1\n', "--num-gpus 1.0: is for --engine ray"),
        ("inputs = [", "job.toml: not TOML"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_the_mistake(place: Path, run: Run, spec: str, words: str) -> None:
    (place / "job.toml").write_text(spec)
    refused(run("job", "run", "job.toml"), words)
    assert not (place / "x").exists()


def test_the_group_alone_shows_its_verbs(run: Run) -> None:
    shown = run("job")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == run("job", "--help").out
    assert all(f"\n  {verb} " in shown.out for verb in ("embed", "run", "status", "verify", "plan"))


def test_status_of_no_job_says_how_to_start_one(place: Path, run: Run) -> None:
    refused(run("job", "status", "out"), "out: there is no job (no job.json); start one with: genembed job embed INPUT -o out")


def test_a_plan_counts_hours_bytes_shards_and_money(place: Path, run: Run, folder_of: Callable[[str], Path]) -> None:
    plan = run(
        "job", "plan", "--docs", "1e9", "-m", folder_of("qwen2"), "--device", "h200", "--price", 3, "--dtype", "float16", "--json"
    ).json
    rate = counted_rate(Cost(shape=Shape.of(folder_of("qwen2")), tokens=128, steps=20), "h200")
    assert plan["documents_per_second"] == pytest.approx(rate)
    assert plan["device_hours"] == pytest.approx(1e9 / rate / 3600)
    assert (plan["shards"], plan["bytes"]) == (15_259, 80_000_000_000)
    assert plan["cost"] == pytest.approx(3 * plan["device_hours"])
    assert "50% of the peak of one h200" in plan["assumed"]
    measured = run("job", "plan", "--docs", 7200, "-m", folder_of("qwen2"), "--rate", 2, "--devices", 4)
    assert "device hours  1.0\ntime          0.2 h on 4 devices" in measured.out
    assert "measured: 2.0 documents/s" in measured.out


def test_a_plan_without_a_rate_or_with_two_is_refused(place: Path, run: Run, folder_of: Callable[[str], Path]) -> None:
    model = folder_of("qwen2")
    refused(run("job", "plan", "--docs", 10, "-m", model), "give --device")
    refused(run("job", "plan", "--docs", 10, "-m", model, "--device", "h200", "--rate", 3), "give --device")
    refused(run("job", "plan", "--docs", 10, "-m", model, "--device", "abacus"), "device 'abacus' is unknown; choose one of h200")
    refused(run("job", "plan", "--docs", 0.5, "-m", model, "--rate", 1), "--docs 0.5")
    refused(run("job", "plan", "--docs", 5, "-m", model, "--device", "h100", "--efficiency", 2), "efficiency=2.0")


def test_a_large_batch_of_a_large_model_is_bound_by_operations_in_the_prompt() -> None:
    shape = Shape(layers=2, hidden=8, attention=8, keys=8, vocabulary=100, body=10**9, parameters=10**9)
    cost = Cost(shape=shape, tokens=100, steps=0)
    assert counted_rate(cost, "h200", efficiency=1.0) == pytest.approx(DEVICES["h200"][0] / cost.one_pass)


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_ends_with_its_workers(place: Path, folder_of: Callable[[str], Path]) -> None:
    """SIGTERM to the job alone, as a scheduler sends it."""
    (place / "rows.jsonl").write_text('{"text": "one more row of the corpus"}\n' * 20_000)
    command = [sys.executable, "-m", "genembed.cli", "job", "embed", "rows.jsonl", "-o", "out", "-m", str(folder_of("bert"))]
    job = subprocess.Popen(
        [*command, "--workers", "2", "--shard-rows", "10000"], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    workers = place / "out" / "workers"
    give_up = time.monotonic() + 60
    while (not workers.is_dir() or len(list(workers.glob("*.json"))) < 2) and time.monotonic() < give_up:
        time.sleep(0.05)
    processes = [json.loads(path.read_text())["process"] for path in workers.glob("*.json")]
    assert len(processes) == 2
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=30)
    assert (job.returncode, b"Traceback" in error) == (143, False)
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
