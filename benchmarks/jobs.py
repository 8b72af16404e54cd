"""Does a corpus job lose a row, or time?

    python benchmarks/jobs.py [--only kills faults scheduler corpus] [--kills 1000] [--rows 1000000] [--documents 100000] [--seed 0]

- `kills`      a job over `--rows` rows is killed (SIGKILL, with its workers) at random instants and started again, until it is done;
               then its files are compared byte for byte with an unbroken run's. Again, until there were `--kills` kills.
- `faults`     a full disk, an input/output error, a part of a write that is lost, and a flipped bit, at every write of a job; and bits
               flipped in a finished one. Each has to be named with its file, and the job has to end in the same bytes afterwards.
- `scheduler`  64 simulated workers, shards of very different lengths: what is lost between two shards of a worker, and how much longer
               the whole takes than the best a list of the same shards allows.
- `corpus`     a real job over `--documents` texts with `mini`: rows/s, and the memory of the process while it runs.
"""

from __future__ import annotations

import argparse
import errno
import gzip
import hashlib
import heapq
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from evaluation_data import DATA
from jobs_stub import Stub, start
from results_file import RESULTS, machine, write

from genembed.errors import JobError
from genembed.jobs.encoder import Place
from genembed.jobs.folder import JobFolder
from genembed.jobs.manifest import damage, finish
from genembed.jobs.run import run_local
from genembed.jobs.work import Worker

PARTS = ("kills", "faults", "scheduler", "corpus")
STUB = Path(__file__).with_name("jobs_stub.py")


def write_rows(path: Path, rows: int) -> Path:
    """Write a corpus of texts of different lengths; one row in a thousand cannot be embedded."""
    with path.open("w") as file:
        for number in range(rows):
            text = None if number % 1000 == 999 else f"{number} {'word ' * (number * 7919 % 23)}"
            file.write(json.dumps({"id": f"d{number}", "text": text}) + "\n")
    return path


def fingerprint(root: Path) -> str:
    """Hash the names and bytes of all files of a finished job."""
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def unbroken(root: Path, rows: Path, shard_rows: int) -> str:
    """Run a job that nobody disturbs, and return what its files are."""
    run_local(start(root, rows, shard_rows), Stub())
    return fingerprint(root)


def kills(folder: Path, *, kills: int, rows: int, seed: int, workers: int = 2) -> dict[str, Any]:
    """Kill jobs again and again; count what is not as it should be."""
    chance = random.Random(seed)
    corpus, shard_rows = write_rows(folder / "rows.jsonl", rows), max(1, rows // 61)
    expected = unbroken(folder / "unbroken", corpus, shard_rows)
    done = jobs = wrong = lost = twice = 0
    root = folder / "job0"
    while done < kills or root.exists():  # the last one is let through
        command = [sys.executable, str(STUB), str(root), str(corpus), str(shard_rows), str(workers)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
            try:
                _, error = process.communicate(timeout=10 ** chance.uniform(-1.3, 1.0) if done < kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                done += 1
                continue
        if process.returncode:
            raise SystemExit(f"the job failed by itself: {error.decode()[-2000:]}")
        jobs += 1
        if fingerprint(root) != expected:
            wrong += 1
        lost, twice = lost + rows - _rows(root), twice + _repeated(root)
        print(f"{done} kills, {jobs} jobs finished, {wrong} of them not the unbroken run's bytes", flush=True)
        shutil.rmtree(root)
        root = folder / f"job{jobs}"
    return {"kills": done, "rows": rows, "workers": workers, "jobs_finished": jobs, "not_identical": wrong, "lost": lost, "twice": twice}


def _rows(root: Path) -> int:
    manifest = json.loads((root / "manifest.json").read_text())
    return int(manifest["rows"] + manifest["rejects"])


def _repeated(root: Path) -> int:
    from pyarrow import parquet

    ids = [one for path in sorted((root / "shards").iterdir()) for one in parquet.read_table(path, columns=["id"])["id"].to_pylist()]
    return len(ids) - len(set(ids))


Write = Callable[[int, memoryview], int]


def _refusing(number: int) -> Callable[[Write], Write]:
    def broken(real: Write) -> Write:
        def write(descriptor: int, content: memoryview) -> int:
            raise OSError(number, os.strerror(number))

        return write

    return broken


def _forgetting(real: Write) -> Write:
    def write(descriptor: int, content: memoryview) -> int:
        real(descriptor, content[: len(content) // 2])
        return len(content)

    return write


def _flipping(real: Write) -> Write:
    def write(descriptor: int, content: memoryview) -> int:
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 16
        return real(descriptor, memoryview(flipped))

    return write


DISKS: dict[str, Callable[[Write], Write]] = {
    "ENOSPC": _refusing(errno.ENOSPC),
    "EIO": _refusing(errno.EIO),
    "short write": _forgetting,
    "flipped bit": _flipping,
}


def faults(folder: Path, *, seed: int, shards: int = 12, flips: int = 200) -> dict[str, Any]:
    """Let the disk fail at every write of a job in turn, and flip bits of a finished one."""
    rows = write_rows(folder / "rows.jsonl", shards * 1000)
    expected = unbroken(folder / "unbroken", rows, 1000)
    writes = 3 * shards + 2  # a shard, its rejects, its receipt; at the end the list of rejects and the manifest
    values: dict[str, Any] = {}
    for name, disk in DISKS.items():
        tried = [_fault(folder / f"{name} {number}", rows, disk, number, expected) for number in range(writes)]
        values[name] = {"tried": len(tried), "not_named": tried.count("not named"), "not_identical": tried.count("not identical")}
        print(f"{name:<12} {values[name]}", flush=True)
    values["flipped in a finished job"] = _flips(JobFolder(folder / "unbroken"), random.Random(seed), flips)
    print(f"flipped in a finished job {values['flipped in a finished job']}", flush=True)
    return values


def _fault(root: Path, rows: Path, disk: Callable[[Write], Write], number: int, expected: str) -> str:
    folder = start(root, rows, 1000)
    real, count, broken = os.write, iter(range(10**6)), ""

    def sometimes(descriptor: int, content: Any) -> int:
        nonlocal broken
        if not isinstance(content, memoryview) or next(count) != number:
            return real(descriptor, content)
        broken = Path(f"/proc/self/fd/{descriptor}").readlink().name.removeprefix(".tmp-").rsplit("-", 2)[0]
        return disk(real)(descriptor, content)

    with mock.patch("os.write", sometimes):
        try:
            run_local(folder, Stub())
        except JobError as error:
            named = broken in str(error)
        else:
            named = False
    run_local(folder, Stub())
    return "not named" if not named else "" if fingerprint(root) == expected else "not identical"


def _flips(folder: JobFolder, chance: random.Random, flips: int) -> dict[str, int]:
    files = [*folder.shards.iterdir(), *folder.shard_rejects.iterdir(), *folder.receipts.iterdir(), folder.manifest]
    missed = 0
    for _ in range(flips):
        path = chance.choice(files)
        content = path.read_bytes()
        bit = chance.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = list(damage(folder))
        # A receipt that lies shows where it is compared: at its shard, or at the manifest.
        missed += not any(path.name.split(".")[0] in line or folder.manifest.name in line for line in found)
        path.write_bytes(content)
    return {"tried": flips, "missed": missed}


def scheduler(folder: Path, *, seed: int, workers: int = 64, shards: int = 768, seconds: float = 4.0) -> dict[str, Any]:
    """Let threads that sleep be workers; one shard in twenty takes four times as long."""
    chance = np.random.default_rng(seed)
    durations = seconds * chance.lognormal(0.0, 0.4, shards) * np.where(chance.random(shards) < 0.05, 4.0, 1.0)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"id": "{number}", "text": "{number}"}}\n' for number in range(shards)))
    job = start(folder / "job", rows, 1)
    log: list[tuple[int, float, float]] = []
    stub = Stub(seconds=tuple(durations), log=log)
    threads = [threading.Thread(target=Worker(job, stub, Place(worker, workers)).run) for worker in range(workers)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    makespan = time.perf_counter() - begin
    finish(job)
    started = sorted(first for _, first, _ in log)
    # Until the last shard is begun there is work for everybody: what a worker does not spend in its encoder then is lost.
    busy = sum(min(last, started[-1]) - first for _, first, last in log)
    available = workers * (started[-1] - begin)
    return {
        "workers": workers,
        "shards": shards,
        "mean_seconds_of_a_shard": round(float(durations.mean()), 2),
        "longest_to_mean": round(float(durations.max() / durations.mean()), 1),
        "overhead": round(1 - busy / available, 5),
        "milliseconds_between_shards": round(1000 * (available - busy) / shards, 1),
        "makespan_seconds": round(makespan, 2),
        "list_scheduling_seconds": round(_list_schedule(durations[np.argsort([number for number, _, _ in log])], workers), 2),
        "made_once": sorted(number for number, _, _ in log) == list(range(shards)),
    }


def _list_schedule(durations: np.ndarray, workers: int) -> float:
    """Return when the last of these shards ends if each goes to whoever is free first, with nothing lost between."""
    free = [0.0] * workers
    for seconds in durations:
        heapq.heapreplace(free, free[0] + float(seconds))
    return max(free)


def documents(data: Path, count: int) -> Iterator[str]:
    """Yield the longest text of every row of the reference data, each text once."""
    seen: set[str] = set()
    for path in sorted([*data.glob("retrieval/*/corpus.jsonl*"), *data.glob("*/*.jsonl*")]):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for line in lines:
                texts = [value for value in json.loads(line).values() if isinstance(value, str)]
                longest = max(texts, key=len, default="")
                if longest and longest not in seen:
                    seen.add(longest)
                    yield longest
                    if len(seen) == count:
                        return


def corpus(folder: Path, *, data: Path, count: int, model: str, shard_rows: int) -> dict[str, Any]:
    """Embed real texts with the command line, and watch the memory of its process."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, text in enumerate(documents(data, count)):
            file.write(json.dumps({"id": f"d{number}", "text": text}) + "\n")
    command = [sys.executable, "-m", "genembed.cli", "job", "embed", str(folder / "rows.jsonl"), "-o", str(folder / "out"), "--json"]
    command += ["-m", model, "--columns", "id,text", "--shard-rows", str(shard_rows), "--max-rejects", "0"]
    begin = time.perf_counter()
    memory: list[tuple[int, float]] = []
    load: list[float] = []  # what else the machine did: the job itself keeps two threads busy
    receipts = folder / "out" / "receipts"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as job:
        while job.poll() is None:
            time.sleep(1)
            done = len(list(receipts.glob("*.json"))) if receipts.is_dir() else 0
            status = Path(f"/proc/{job.pid}/status")
            lines = status.read_text().splitlines() if job.poll() is None and status.exists() else []
            memory += [(done, int(line.split()[1]) / 1024) for line in lines if line.startswith("VmRSS")]
            load.append(os.getloadavg()[0])
        summary = json.loads(job.communicate()[0])
    seconds = time.perf_counter() - begin
    peaks = [max(mib for done, mib in memory if done == shard) for shard in sorted({done for done, _ in memory})]
    return {
        "model": model,
        **{name: summary[name] for name in ("rows", "rejects", "truncated", "tokens", "mean_steps", "shards")},
        "seconds": round(seconds, 1),
        "rows_per_second": round(summary["rows"] / seconds, 1),
        "tokens_per_second": round(summary["tokens"] / seconds),
        "mean_load": round(sum(load) / max(len(load), 1), 1),
        "peak_memory_mib_by_shard": [round(peak) for peak in peaks],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=("kills", "faults", "scheduler", "corpus"), default=["kills", "faults", "scheduler", "corpus"]
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--shard-rows", type=int, default=8_192)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    print(json.dumps(machine(), indent=1))
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": lambda folder: kills(folder, kills=given.kills, rows=given.rows, seed=given.seed),
        "faults": lambda folder: faults(folder, seed=given.seed),
        "scheduler": lambda folder: scheduler(folder, seed=given.seed),
        "corpus": lambda folder: corpus(folder, data=given.data, count=given.documents, model=given.model, shard_rows=given.shard_rows),
    }
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            values = {"seed": given.seed, **parts[name](Path(folder))}
        print(write(f"jobs-{name}", values, folder=given.out))
        print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
