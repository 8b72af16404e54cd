"""The same jobs on a Ray cluster of two nodes, with a worker and a node that die in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from genembed.jobs.folder import JobFolder
from genembed.jobs.run import prepare
from stub_encoder import Stub
from test_jobs import bytes_of, corpus, description, embed, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(util.find_spec("ray") is None, reason="Ray is not installed: pip install 'genembed[ray]'"),
]
TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}


def test_a_cluster_that_loses_a_worker_and_a_node_writes_the_same_bytes(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [f"row {number}" for number in range(300)])
    embed(tmp_path / "unbroken", source)
    folder = JobFolder(tmp_path / "out")
    prepare(folder, corpus(source), description(Stub()))
    command = [sys.executable, str(TESTS / "ray_cluster.py"), str(folder.root)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["complete"], done.stderr[-3000:]
    assert outcome["killed_at"] < 30, "every shard was done before the node was killed"
    assert bytes_of(folder.root) == bytes_of(tmp_path / "unbroken")


def test_a_cluster_of_its_own_is_started_for_the_job_and_what_an_actor_refuses_is_the_jobs_error(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*["fine"] * 20, *["refuse"] * 9])
    folder = JobFolder(tmp_path / "out")
    prepare(folder, corpus(source), description(Stub()))
    code = (
        "import sys; from pathlib import Path; from genembed.jobs.cluster import run_on_ray; from genembed.jobs.folder import JobFolder;"
        "from stub_encoder import Stub; folder = JobFolder(Path(sys.argv[1])); run_on_ray(folder, folder.read_plan(), Stub(), num_cpus=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder.root)], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert "JobError: 9 rows cannot be embedded, more than --max-rejects 5" in done.stderr
    assert len(list(folder.receipts.iterdir())) == 2
