"""The short form of benchmarks/jobs.py: jobs that are killed, disks that fail, workers that wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def jobs(benchmarks: Path) -> Any:
    import jobs

    return jobs


@pytest.mark.slow
def test_a_job_that_is_killed_again_and_again_ends_in_the_bytes_of_an_unbroken_one(jobs: Any, tmp_path: Path) -> None:
    found = jobs.kills(tmp_path, kills=4, rows=50_000, seed=3)
    assert found["jobs_finished"] >= 1
    assert (found["not_identical"], found["lost"], found["twice"]) == (0, 0, 0)


def test_every_failing_write_and_every_flipped_bit_is_named(jobs: Any, tmp_path: Path) -> None:
    found = jobs.faults(tmp_path, seed=1, shards=1, flips=10)
    assert found.pop("flipped in a finished job") == {"tried": 10, "missed": 0}
    assert found == {name: {"tried": 5, "not_named": 0, "not_identical": 0} for name in jobs.DISKS}


def test_workers_of_very_different_shards_do_each_once_and_hardly_wait(jobs: Any, tmp_path: Path) -> None:
    found = jobs.scheduler(tmp_path, seed=1, workers=8, shards=32, seconds=0.2)
    assert found["made_once"]
    assert found["overhead"] < 0.5, "as much is lost between shards as is spent on them"
    assert found["makespan_seconds"] >= found["list_scheduling_seconds"]


@pytest.mark.slow
def test_a_real_job_is_watched_to_its_end(jobs: Any, tmp_path: Path) -> None:
    data = tmp_path / "data" / "retrieval" / "set"
    data.mkdir(parents=True)
    rows = [{"id": str(number), "text": f"a document of number {number}"} for number in range(150)]
    (data / "corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, rows[0]]))
    found = jobs.corpus(tmp_path, data=tmp_path / "data", count=120, model="mini", shard_rows=50)
    assert (found["rows"], found["rejects"], found["shards"]) == (120, 0, 3)
    assert all(mib > 50 for mib in found["peak_memory_mib_by_shard"])
