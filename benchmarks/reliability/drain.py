"""Is every request that was accepted answered when the server is told to stop?

    python benchmarks/reliability/drain.py [--size 300]

`--size` times a server over a tiny model is started, clients ask it for texts in closed loops, and after a random time it gets SIGTERM.
Wrong: a request that was sent whole before the signal and got no answer, or another one than 200 (or 429, where the queue was full); a
server that has not ended ten seconds later.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from campaign import Row, Tally, main
from processes import NAME, TEXTS, Address, answer, connected, forked, request, tiny

from genembed import Embedder

_CLIENTS = 8
_END_SECONDS = 10.0
_SETTLED_SECONDS = 0.05
"""A request sent so shortly before the signal may not have reached the server: it was not accepted."""


async def clients(address: Address, rng: random.Random, tally: Tally) -> None:
    """Ask in closed loops, and send the signal in between."""
    told = 0.0

    async def one() -> None:
        while not told:
            content = request("/v1/embeddings", {"model": NAME, "input": rng.choices(TEXTS, k=8), "steps": 20})
            try:
                async with connected(address) as (reader, writer):
                    writer.write(content)
                    await writer.drain()
                    sent = time.perf_counter()
                    answered = await answer(reader)
            except ConnectionError:
                continue  # it listens no more
            if not told or sent < told - _SETTLED_SECONDS:
                tally.check(answered.status in (200, 429), "accepted before the signal", f"status {answered.status}")

    async def tell() -> None:
        nonlocal told
        await asyncio.sleep(0.05 + rng.random() * 0.3)
        told = time.perf_counter()
        os.kill(address.process.pid, signal.SIGTERM)

    async with asyncio.timeout(60):
        await asyncio.gather(tell(), *(one() for _ in range(_CLIENTS)))


def stop(embedder: Embedder, rng: random.Random, tally: Tally) -> None:
    """Start a server, load it, and stop it."""
    with forked(embedder) as address:
        asyncio.run(clients(address, rng, tally))
        address.process.join(_END_SECONDS)
        tally.check(address.process.exitcode is not None, "the server ends", f"it is there after {_END_SECONDS:g} seconds")


def run(size: int, seed: int) -> Tally:
    """Stop so many servers."""
    tally, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        embedder = tiny(Path(place))
        for _ in range(size):
            stop(embedder, rng, tally)
    return tally


ROW = Row(
    name="drain",
    property="told to stop under load, the server answers everything it has accepted, and ends",
    size=300,
    unit="servers that are stopped",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
