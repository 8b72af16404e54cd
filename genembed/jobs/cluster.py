"""The same workers on a Ray cluster: each actor of a pool makes shards of the shared folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genembed.errors import ConfigurationError, GenembedError, JobError, missing_extra
from genembed.jobs.encoder import EncoderFactory, Place
from genembed.jobs.folder import JobFolder
from genembed.jobs.manifest import finish
from genembed.jobs.plan import Plan
from genembed.jobs.work import Worker

_ROUNDS = 3
"""How often shards that a broken cluster has left out are given out again."""


class ShardActor:
    """A worker, as Ray Data runs one: shard numbers in, their fates out, in plain columns."""

    def __init__(self, root: str, factory: EncoderFactory) -> None:
        folder = JobFolder(Path(root))
        if not folder.job.exists():
            raise ConfigurationError(
                f"{root}: is not there on node {os.uname().nodename}; the job's folder has to be on a shared file system."
            )
        self._worker = Worker(folder, factory, Place())

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Make the shards of a batch. What is our error is a value, as Ray would try it again; a death is not."""
        fates = [self._fate(int(index)) for index in batch["shard"]]
        return {"shard": [int(index) for index in batch["shard"]], "error": fates}

    def _fate(self, index: int) -> str:
        try:
            self._worker.make(index)
        except GenembedError as error:
            return str(error)
        return ""


def run_on_ray(
    folder: JobFolder,
    plan: Plan,
    factory: EncoderFactory,
    *,
    address: str | None = None,
    workers: int = 1,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> dict[str, Any]:
    """Make all shards that are missing on a Ray cluster, and return the manifest.

    Every node needs the folder, the input and the model under the same names, and genembed installed.

    Args:
        folder: Of the job, on a file system that all nodes share.
        plan: Of the job.
        factory: Makes the encoder inside an actor.
        address: Of an existing cluster, or `auto`; None starts one on this machine for the time of the job.
        workers: Actors at most; there are as many as the cluster has room for.
        num_cpus: Processors of an actor.
        num_gpus: GPUs of an actor; may be a part of one.

    Raises:
        JobError: If a worker cannot go on, or the cluster loses shards again and again.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise missing_extra("ray", "ray") from error
    folder_path = str(folder.root.resolve())
    with _session(ray, address):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the job has a line of its own, in rows
        for _ in range(_ROUNDS):
            missing = [shard.index for shard in plan.shards if not folder.receipt_file(shard.index).exists()]
            if not missing:
                return finish(folder)
            rows = ray.data.from_items([{"shard": index} for index in missing], override_num_blocks=len(missing))
            fates = rows.map_batches(
                ShardActor,
                fn_constructor_args=(folder_path, factory),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
            for fate in fates.iter_rows():
                if fate["error"]:
                    raise JobError(fate["error"])
    lost = next(shard.index for shard in plan.shards if not folder.receipt_file(shard.index).exists())
    raise JobError(
        f"shard {lost} was given out {_ROUNDS} times and is not done: the cluster loses its workers. Go on with the same command."
    )


@contextmanager
def _session(ray: Any, address: str | None) -> Iterator[None]:
    """Use the session that is there, or one for the time of the block."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
    try:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.init(logging_level=logging.WARNING, log_to_driver=False, **local)
    except (ConnectionError, ValueError) as error:
        raise ConfigurationError(f"--address {address}: no Ray cluster answers there: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
