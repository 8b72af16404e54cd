"""What every worker does, wherever it runs: take a shard that nobody has, make it, take the next."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from typing import Any

from genembed.errors import ConfigurationError, JobError
from genembed.jobs.claim import claimed
from genembed.jobs.encoder import Encoded, Encoder, EncoderFactory, Place
from genembed.jobs.folder import Description, JobFolder, Receipts
from genembed.jobs.heartbeat import Reporter
from genembed.jobs.plan import Plan, Shard
from genembed.jobs.rows import Reject
from genembed.jobs.shard import embed_shard

_POLL_SECONDS = 0.5


class Worker:
    """Makes shards of one job. Any number of workers may share a folder, and any of them may die at any instant."""

    def __init__(self, folder: JobFolder, factory: EncoderFactory, place: Place) -> None:
        self._folder, self._place = folder, place
        self._description: Description = folder.read_description()
        self._plan: Plan = folder.read_plan()
        self._receipts = Receipts(folder)
        self._encoder: Encoder = factory(place)
        check_identity(self._description, self._encoder.identity)

    def run(self) -> None:
        """Work until every shard is done, by this worker or by others.

        Raises:
            JobError: If the input or the disk fails, or too many rows are rejected.
        """
        reporter = Reporter(self._folder, self._place.worker)
        try:
            while left := self._left():
                if not sum(self._make(shard, reporter) for shard in left):
                    time.sleep(_POLL_SECONDS)  # others make what is left; one of them may die
        finally:
            reporter.close()

    def make(self, index: int) -> None:
        """Make one shard, unless it is done; wait for whoever is at it.

        Raises:
            JobError: As for `run`.
        """
        reporter = Reporter(self._folder, self._place.worker)
        try:
            self._make(self._plan.shards[index], reporter, wait=True)
        finally:
            reporter.close()

    def _left(self) -> list[Shard]:
        """Return the shards that are not done; each worker begins at another one, so that they do not queue at the same lock."""
        done = self._receipts.refresh()
        left = [shard for shard in self._plan.shards if shard.index not in done]
        first = len(left) * self._place.worker // self._place.workers
        return [*left[first:], *left[:first]]

    def _make(self, shard: Shard, reporter: Reporter, *, wait: bool = False) -> bool:
        """Make a shard if it is free, and say whether it was."""
        if self._receipts.has(shard.index):
            return False
        with claimed(self._folder.lock_file(shard.index), wait=wait) as mine:
            if not mine or self._receipts.has(shard.index):
                return False
            reporter.begin(shard.index)

            def advance(encoded: Encoded, rejects: int) -> None:
                _stop_without_parent()
                reporter.advance(encoded, rejects)

            embed_shard(
                self._folder,
                self._plan,
                shard,
                self._encoder,
                advance=advance,
                check_rejects=self._check_rejects,
            )
            reporter.end()
        return True

    def _check_rejects(self, rejects: Sequence[Reject]) -> None:
        limit = self._description.max_rejects
        before = sum(receipt.rejects for receipt in self._receipts.refresh().values())
        if rejects and before + len(rejects) > limit:
            shown = "; ".join(f"{reject.place}: {reject.reason}" for reject in rejects[:3])
            raise JobError(
                f"{before + len(rejects)} rows cannot be embedded, more than --max-rejects {limit}, of which these: {shown} "
                f"Mend the input, or allow more; earlier ones are in {self._folder.shard_rejects}."
            )


def check_identity(description: Description, identity: Mapping[str, Any]) -> None:
    """Refuse an encoder that would make other vectors than the job's.

    Raises:
        ConfigurationError: With the first setting that differs.
    """
    known, found = description.identity, identity
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) != found.get(name):
            raise ConfigurationError(
                f"the job was started with {name}={known.get(name)!r}, and this is {found.get(name)!r}: its rows would not compare; go on "
                "with the same model and options, or embed into another folder."
            )


def _stop_without_parent() -> None:
    """End a worker whose job was killed: a worker without a job would go on for hours, seen by nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("the job that started this worker is gone")
