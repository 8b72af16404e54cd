"""Does a server that works for hours grow, lose answers, or mix them up?

    python benchmarks/reliability/soak.py [--size 7200] [--leak]

A server over a tiny model works for `--size` seconds at 80 % of what it can do, measured first. Texts arrive at random; every answer is
compared with what its text has alone; one client in twenty crashes: it leaves in the middle of its request, or of the answer. The server's
memory is read every two seconds. Wrong: an answer that is missing, or another text's. Goal: after a warm-up of a fifth of the time, memory
grows by less than 2 MiB an hour, as far as its interval (95 %) can tell.

`--leak` is the negative control: a server that keeps 20 kB of every request. This script has to find that, or it could not find anything.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from campaign import Row, Tally, main
from processes import NAME, Address, ask, connected, forked, idle, request, tiny

from genembed.serve.service import Service

LOAD = 0.8
STEPS = 10
GOAL_MIB_PER_HOUR = 2.0
LEAK_BYTES = 20_000
_CRASHES = 0.05
_CLIENTS = 8
_EVERY_SECONDS = 2.0
_WARM = 0.2
_TEXTS = [f"{word} {number} of a claim about glucose" for number in range(64) for word in ("a", "the", "every", "no")]
_PAGE = 4_096


@dataclass
class Course:
    """How a run went."""

    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    asked: int = 0
    crashed: int = 0


def memory_mib(address: Address) -> float:
    """Return the memory that a server holds."""
    return int(Path(f"/proc/{address.process.pid}/statm").read_text().split()[1]) * _PAGE / 2**20


def slope(seconds: Sequence[float], mib: Sequence[float]) -> tuple[float, float]:
    """Return the growth in MiB an hour, and half the width of its 95 % interval.

    Neighbouring readings are alike, so the interval is that of the means of 20 stretches: a straight line through them.
    """
    stretches = [part for part in np.array_split(np.stack([np.asarray(seconds) / 3_600, np.asarray(mib)]), 20, axis=1) if part.size]
    x, y = np.array([part.mean(axis=1) for part in stretches]).T
    if len(x) < 3:
        return 0.0, float("inf")
    (rate, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(rate), 1.96 * float(np.sqrt(covariance[0, 0]))


async def _one(address: Address, row: int, expected: np.ndarray, rng: random.Random, course: Course, tally: Tally) -> None:
    content = request("/v1/embeddings", {"model": NAME, "input": _TEXTS[row], "steps": STEPS})
    course.asked += 1
    if rng.random() < _CRASHES:
        course.crashed += 1
        async with connected(address) as (reader, writer):
            writer.write(content[: rng.randrange(1, len(content))] if rng.random() < 0.5 else content)
            await asyncio.wait({asyncio.ensure_future(reader.read(1))}, timeout=rng.random() * 0.2)
        return
    answered = await ask(address, content)
    if answered.status != 200:  # where others took the processors, 80 % of what could be done before may be too much
        tally.check(answered.status == 429, "refused" if answered.status == 429 else "lost", f"status {answered.status}")
        return
    apart = float(np.abs(np.asarray(answered.value["data"][0]["embedding"]) - expected[row]).max())
    tally.check(apart <= 1e-5, "answered", f"text {row} is apart by {apart:.2g}")


async def capacity(address: Address, seconds: float) -> float:
    """Return the texts/s of clients in a closed loop."""
    begin, done = time.perf_counter(), 0

    async def one() -> None:
        nonlocal done
        while time.perf_counter() < begin + seconds:
            await ask(address, request("/v1/embeddings", {"model": NAME, "input": _TEXTS[done % len(_TEXTS)], "steps": STEPS}))
            done += 1

    await asyncio.gather(*(one() for _ in range(_CLIENTS)))
    return done / (time.perf_counter() - begin)


async def measured(address: Address, expected: np.ndarray, seconds: float, seed: int, tally: Tally) -> Course:
    """Load a server for so long."""
    rng, course = random.Random(seed), Course()
    rate = LOAD * await capacity(address, min(10.0, seconds / 10))
    begin = due = time.perf_counter()

    async def watch() -> None:
        while True:
            course.seconds.append(time.perf_counter() - begin)
            course.mib.append(memory_mib(address))
            await asyncio.sleep(min(_EVERY_SECONDS, seconds / 100))

    watching = asyncio.ensure_future(watch())
    async with asyncio.TaskGroup() as group:
        while due < begin + seconds:
            group.create_task(_one(address, rng.randrange(len(_TEXTS)), expected, rng, course, tally))
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    watching.cancel()
    tally.check(await idle(address), "nothing is left behind", "texts are under way or queued though nobody waits")
    tally.measure("texts_per_second", course.asked / seconds)
    return course


def leaking() -> None:
    """Make every request leave something behind, in this process and those it forks."""
    kept: list[bytes] = []
    embed = Service.embed

    async def embed_and_keep(self: Service, *arguments: object, **options: object) -> object:
        kept.append(random.randbytes(LEAK_BYTES))
        return await embed(self, *arguments, **options)  # type: ignore[arg-type]

    Service.embed = embed_and_keep  # type: ignore[method-assign, assignment]


def run(size: int, seed: int, *, leak: bool = False) -> Tally:
    """Load a server for so many seconds."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as place:
        embedder = tiny(Path(place))
        expected = embedder.encode(_TEXTS, steps=STEPS)
        if leak:
            leaking()
        with forked(embedder) as address:
            course = asyncio.run(measured(address, expected, float(size), seed, tally))
    _judge(tally, course)
    return tally


def _judge(tally: Tally, course: Course) -> None:
    first = next((place for place, second in enumerate(course.seconds) if second >= _WARM * course.seconds[-1]), 0)
    rate, half = slope(course.seconds[first:], course.mib[first:])
    tally.figures |= {"asked": course.asked, "crashed": course.crashed, "slope_interval_mib_per_hour": round(half, 2)}
    tally.measure("mib_at_the_end", course.mib[-1])
    tally.measure("slope_mib_per_hour", rate)
    if rate - half > GOAL_MIB_PER_HOUR:
        tally.missed.append(f"memory grows by {rate:.1f} ± {half:.1f} MiB an hour, goal at most {GOAL_MIB_PER_HOUR:g}")
    step = max(1, len(course.mib) // 500)
    tally.series = {"seconds": [round(one, 1) for one in course.seconds[::step]], "mib": [round(one, 3) for one in course.mib[::step]]}


ROW = Row(
    name="soak",
    property="hours at 80 % load with clients that crash: no answer is lost or mixed up, and memory does not grow",
    size=7_200,
    unit="seconds",
    run=run,
)
CONTROL = Row(
    name="soak-control",
    property=f"negative control of the row above: a server that keeps {LEAK_BYTES:,} bytes of every request is found out",
    size=600,
    unit="seconds",
    run=partial(run, leak=True),
)

if __name__ == "__main__":
    leak = "--leak" in sys.argv
    if leak:
        sys.argv.remove("--leak")
    main(CONTROL if leak else ROW, __doc__)
