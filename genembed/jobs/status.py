"""How far a job is: read from its folder alone, by anybody, while others work in it."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType

from tqdm import tqdm

from genembed.errors import CheckpointError
from genembed.jobs.folder import JobFolder, Receipts
from genembed.jobs.heartbeat import heartbeats
from genembed.jobs.plan import Plan

_EVERY_SECONDS = 1.0
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} rows [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a job is."""

    rows: int
    """Of the corpus."""
    done: int
    """Rows that are safe, embedded or rejected."""
    in_work: int
    """Rows that are embedded, in shards that are not safe yet."""
    shards: int
    shards_done: int
    rejects: int
    truncated: int
    mean_steps: float
    """Of embedded rows."""
    workers: int
    """That are at work."""
    rows_per_second: float
    """Of all workers together, since each began; 0 while none is at work."""
    tokens_per_second: float
    complete: bool
    """Whether the manifest is written."""

    @property
    def seconds_left(self) -> float | None:
        """Until the last row, at this rate; None while nothing moves."""
        left = self.rows - self.done - self.in_work
        if self.complete:
            return 0.0
        return left / self.rows_per_second if self.rows_per_second else None


class Watch:
    """Reads the state of a job again and again; a receipt is read once."""

    def __init__(self, folder: JobFolder, plan: Plan | None = None) -> None:
        self._folder = folder
        self._plan = folder.read_plan() if plan is None else plan
        self._receipts = Receipts(folder)

    def status(self) -> Status:
        """Return how far the job is now.

        Raises:
            CheckpointError: If one of its files is damaged.
        """
        workers = list(heartbeats(self._folder))
        receipts = self._receipts.refresh()
        embedded = sum(receipt.rows for receipt in receipts.values())
        rejects = sum(receipt.rejects for receipt in receipts.values())
        steps = sum(receipt.steps for receipt in receipts.values())
        busy = [worker for worker in workers if worker.busy_seconds]
        open_rows = sum(worker.shard_rows for worker in workers if worker.shard is not None and worker.shard not in receipts)
        return Status(
            rows=self._plan.rows,
            done=embedded + rejects,
            in_work=open_rows,
            shards=len(self._plan.shards),
            shards_done=len(receipts),
            rejects=rejects + sum(worker.shard_rejects for worker in workers if worker.shard not in receipts),
            truncated=sum(receipt.truncated for receipt in receipts.values()),
            mean_steps=steps / embedded if embedded else _mean(sum(one.steps for one in busy), sum(one.rows for one in busy)),
            workers=len(workers),
            rows_per_second=sum((worker.rows / worker.busy_seconds for worker in busy), 0.0),
            tokens_per_second=sum((worker.tokens / worker.busy_seconds for worker in busy), 0.0),
            complete=self._folder.manifest.exists(),
        )


def _mean(total: int, count: int) -> float:
    return total / count if count else 0.0


class Progress:
    """A line on stderr, and a file for Prometheus, while the block runs."""

    def __init__(self, folder: JobFolder, plan: Plan, *, prometheus: str | None = None, show_progress_bar: bool = True) -> None:
        self._watch = Watch(folder, plan)
        self._prometheus = prometheus
        self._shown = show_progress_bar
        self._stop = Event()
        self._thread = Thread(target=self._run, name="progress", daemon=True)
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Progress:
        """Begin to tell."""
        status = self._watch.status()
        self._bar = tqdm(
            total=status.rows, initial=status.done, unit="row", bar_format=_BAR, smoothing=0.1, leave=False, disable=not self._shown
        )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Tell a last time."""
        self._stop.set()
        self._thread.join()
        self._tell()
        if self._bar is not None:
            self._bar.close()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_SECONDS):
            self._tell()

    def _tell(self) -> None:
        try:
            status = self._watch.status()
        except CheckpointError:
            return  # whoever needs the damaged file says so; a line of progress does not
        if self._bar is not None:
            self._bar.n = status.done + status.in_work
            rejects = f", {status.rejects} rejected" if status.rejects else ""
            rate = f"{status.tokens_per_second:,.0f} tokens/s, " if status.tokens_per_second else ""
            known = f"{rate}{status.mean_steps:.2f} steps{rejects}"
            self._bar.set_postfix_str(known if status.done + status.in_work else "loading the model")
        if self._prometheus is not None:
            from genembed.jobs.metrics import write_metrics

            write_metrics(self._prometheus, status)
