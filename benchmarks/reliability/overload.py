"""What happens to the texts of a server that is asked for five times what it can do?

    python benchmarks/reliability/overload.py [--size 60]

A server over `mini` with a short queue. First clients in a closed loop find out what it can do; then texts arrive at random (Poisson) at
five times that rate, for `--size` seconds, whatever the server does. Wrong: a request that is neither answered with its vectors, nor
refused with 429 and a time to come back. Goals: at least 95 % of the peak goes on being done, and a refusal takes less than 50 ms (99 %).
Clients and server share the machine.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import numpy as np
from campaign import Row, Tally, main
from processes import NAME, TEXTS, Address, Answered, ask, forked, idle, metric, mini, request

from genembed.serve.limits import Limits

LIMITS = Limits(queue_tokens=4_000, batch_tokens=16 * (512 + 20))
TIMES = 5
_CLIENTS = 8
_CONTENT = request("/v1/embeddings", {"model": NAME, "input": TEXTS * 4, "steps": 20})


async def peak(address: Address, seconds: float) -> float:
    """Return the requests/s that clients in a closed loop get answered."""
    begin, done = time.perf_counter(), 0

    async def one() -> None:
        nonlocal done
        while time.perf_counter() < begin + seconds:
            answered = await ask(address, _CONTENT)
            done += answered.status == 200

    await asyncio.gather(*(one() for _ in range(_CLIENTS)))
    return done / (time.perf_counter() - begin)


async def flood(address: Address, rate: float, seconds: float, rng: random.Random) -> list[tuple[Answered, float]]:
    """Send requests at random times; return what each got, and how long it took."""
    found: list[tuple[Answered, float]] = []

    async def one() -> None:
        begin = time.perf_counter()
        found.append((await ask(address, _CONTENT), time.perf_counter() - begin))

    begin = due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        while due < begin + seconds:
            group.create_task(one())
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return found


async def measured(address: Address, seconds: float, seed: int) -> Tally:
    """Find the peak, then ask for five times as much."""
    tally = Tally()
    await peak(address, 1.0)
    best = await peak(address, max(2.0, seconds / 4))
    counted = await metric(address, "genembed_requests_total")
    begin = time.perf_counter()
    found = await flood(address, TIMES * best, seconds, random.Random(seed))
    took = time.perf_counter() - begin
    for answered, _ in found:
        refused = answered.status == 429 and b"retry-after: " in answered.head.lower()
        tally.check(answered.status == 200 or refused, f"status {answered.status}", repr(answered.body[:100]))
    # The request for the counters of before is among those that are counted now.
    tally.check(await metric(address, "genembed_requests_total") - counted == len(found) + 1, "counters", "do not add up to what was sent")
    tally.check(await idle(address), "nothing is left behind", "texts are under way or queued though nobody waits")
    _goals(tally, found, best, took)
    return tally


def _goals(tally: Tally, found: Sequence[tuple[Answered, float]], best: float, took: float) -> None:
    answered, refused = ([seconds for one, seconds in found if one.status == status] for status in (200, 429))
    tally.measure("peak_requests_per_second", best)
    tally.measure("asked_per_second", len(found) / took)
    tally.measure("goodput_share_of_peak", len(answered) / took / best, at_least=0.95)
    tally.measure("refused", len(refused))
    if refused:
        tally.measure("refusal_p50_ms", 1e3 * float(np.median(refused)))
        tally.measure("refusal_p99_ms", 1e3 * float(np.quantile(refused, 0.99)), at_most=50.0)
    if answered:
        tally.measure("answer_p99_ms", 1e3 * float(np.quantile(answered, 0.99)))


def run(size: int, seed: int) -> Tally:
    """Flood a server for so many seconds."""
    with forked(mini(), limits=LIMITS) as address:
        return asyncio.run(measured(address, float(size), seed))


ROW = Row(
    name="overload",
    property="asked for five times what it can do, the server does what it can and refuses the rest at once with 429",
    size=60,
    unit="seconds",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
