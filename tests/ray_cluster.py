"""Run a job on a cluster of two nodes, kill a worker and then a node in its middle: a process of its own, as Ray opens sockets."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from genembed.jobs.cluster import run_on_ray
from genembed.jobs.folder import JobFolder
from stub_encoder import Stub


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            raise SystemExit("the cluster does not work")
        time.sleep(0.02)


def main(root: Path) -> None:
    folder = JobFolder(root)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20})
    node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    job = threading.Thread(target=lambda: run_on_ray(folder, folder.read_plan(), Stub(seconds=0.5), workers=3, num_cpus=1), daemon=True)
    job.start()

    def receipts() -> int:
        return len(list(folder.receipts.glob("*.json")))

    def processes() -> list[int]:
        return [json.loads(path.read_text())["process"] for path in folder.workers.glob("*.json")]

    wait_for(lambda: receipts() >= 2 and processes())
    os.kill(processes()[0], signal.SIGKILL)
    before = receipts()
    wait_for(lambda: receipts() >= before + 2)
    if folder.manifest.exists():
        raise SystemExit("the job ended before a node could be killed")
    cluster.remove_node(node, allow_graceful=False)
    killed_at = receipts()
    job.join(timeout=240)
    sys.stdout.write(f"{json.dumps({'killed_at': killed_at, 'complete': folder.manifest.exists()})}\n")
    sys.stdout.flush()
    os._exit(0)  # what is left of a cluster with a dead node may wait for it


if __name__ == "__main__":
    main(Path(sys.argv[1]))
