"""A job from its beginning to its manifest, on this machine."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genembed.errors import ConfigurationError, GenembedError, InputError, JobError
from genembed.jobs.claim import claimed
from genembed.jobs.encoder import EncoderFactory, Place
from genembed.jobs.folder import Description, JobFolder, description_json
from genembed.jobs.inputs import changed_file, find_files
from genembed.jobs.manifest import finish
from genembed.jobs.plan import Plan, make_plan
from genembed.jobs.storage import commit_json
from genembed.jobs.work import Worker, check_identity
from genembed.records import TEXT_COLUMN, Columns

SHARD_ROWS = 65_536
MAX_REJECTS = 1_000
_REPLACED = 3
"""Workers that may die one after the other, without a shard done between, before the job gives up."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is read, and how it is cut."""

    inputs: Sequence[str]
    """Files, folders, patterns, URLs."""
    text_column: str = TEXT_COLUMN
    id_column: str | None = None
    """None: the number of the row, from 0."""
    file_format: str | None = None
    """Of all files, where their names do not tell."""
    shard_rows: int = SHARD_ROWS


def prepare(folder: JobFolder, corpus: Corpus, description: Description, *, resume: bool = True, show_progress_bar: bool = False) -> Plan:
    """Make a job's folder, or find the job that is there and make sure that it is the same.

    Raises:
        ConfigurationError: If another job is there, its input has changed, or `resume` is False and a job is there.
        InputError: If the input is not what its names say.
    """
    if re.match(r"[a-z][a-z0-9+]+:/", str(folder.root)):
        raise ConfigurationError(f"{folder.root}: shards are renamed into place, which object stores cannot; write to a disk, then copy.")
    files = find_files(corpus.inputs, corpus.file_format)
    columns = Columns(corpus.text_column, corpus.id_column, "--columns")
    if folder.root.is_dir() and any(folder.root.iterdir()) and not folder.job.exists() and not folder.locks.is_dir():
        raise ConfigurationError(f"{folder.root}: is a folder with other things in it; choose another one.")
    folder.make()
    with claimed(folder.lock_file("prepare"), wait=True):
        if not folder.job.exists():
            plan = make_plan(files, columns, corpus.shard_rows, show_progress_bar=show_progress_bar)
            if not plan.rows:
                raise InputError(f"{', '.join(corpus.inputs)}: there are no rows to embed.")
            commit_json(folder.plan, plan.to_json())
            commit_json(folder.job, description_json(description))
            return plan
        if not resume:
            raise ConfigurationError(f"{folder.root}: there is a job already; go on with it (--resume), or choose another folder.")
        plan = folder.read_plan()
        _check_same(folder, plan, corpus, columns, description)
        changed = changed_file({file.url: (file, digest) for file, digest in zip(plan.files, plan.hashes, strict=True)}, files)
        if changed is not None:
            raise ConfigurationError(f"{folder.root}: {changed}; the job goes on with the input it was planned for, or in another folder.")
    return plan


def _check_same(folder: JobFolder, plan: Plan, corpus: Corpus, columns: Columns, description: Description) -> None:
    before = folder.read_description()
    check_identity(before, description.identity)
    for option, known, given in (
        ("shard rows", plan.shard_rows, corpus.shard_rows),
        ("text column", plan.columns.text, columns.text),
        ("id column", plan.columns.id, columns.id),
        ("output", before.output, description.output),
    ):
        if known != given:
            raise ConfigurationError(f"{folder.root}: the job was started with {option} {known}, and this is {given}; go on with the same.")
    if before.max_rejects != description.max_rejects:  # the one thing that may change: it decides no row
        commit_json(folder.job, description_json(description))


def run_local(folder: JobFolder, factory: EncoderFactory, *, workers: int = 1) -> dict[str, Any]:
    """Make all shards that are missing, in this process or in several others, and return the manifest.

    Raises:
        JobError: If a worker cannot go on, or workers die again and again.
        ConfigurationError: If `workers` is not positive.
    """
    if workers < 1:
        raise ConfigurationError(f"workers={workers}: at least one is needed.")
    if not folder.manifest.exists():
        if workers == 1:
            Worker(folder, factory, Place()).run()
        else:
            _run_processes(folder, factory, workers)
    return finish(folder)


def _work(root: Path, factory: EncoderFactory, place: Place, complaints: Any) -> None:
    """Be a worker in a process of its own."""
    try:
        Worker(JobFolder(root), factory, place).run()
    except GenembedError as error:
        complaints.put(f"{error!s:.4000}")  # what does not fit into a pipe would wait for a reader that waits for this process
        raise SystemExit(2) from error


def _run_processes(folder: JobFolder, factory: EncoderFactory, workers: int) -> None:
    """Keep so many workers alive until one has nothing left to do; replace those that die."""
    context = multiprocessing.get_context("spawn")
    complaints = context.SimpleQueue()

    def start(worker: int) -> Any:
        process = context.Process(target=_work, args=(folder.root, factory, Place(worker, workers), complaints), daemon=True)
        process.start()
        return process

    running = {worker: start(worker) for worker in range(workers)}
    deaths, done = 0, _done(folder)
    try:
        while running:
            time.sleep(_POLL_SECONDS)
            for worker, process in [*running.items()]:
                if process.is_alive():
                    continue
                del running[worker]
                if process.exitcode == 0:
                    continue
                if not complaints.empty():
                    raise JobError(complaints.get())
                deaths, done = (deaths + 1 if _done(folder) == done else 1), _done(folder)
                if deaths > _REPLACED:
                    raise JobError(_death(process.exitcode, deaths))
                running[worker] = start(worker)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _done(folder: JobFolder) -> int:
    return sum(1 for _ in folder.receipts.glob("*.json"))


def _death(exitcode: int | None, deaths: int) -> str:
    how = f"signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit status {exitcode}"
    hint = "; the system kills with signal 9 when memory is used up: use fewer workers or smaller shards" if exitcode == -9 else ""
    return (
        f"{deaths} workers died without finishing a shard, the last one of {how}{hint}. What is done is kept; go on with the same command."
    )
