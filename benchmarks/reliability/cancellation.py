"""Do clients that leave hold places, or change what others get?

    python benchmarks/reliability/cancellation.py [--size 10000]

A server over a tiny model. `--size` clients leave at a random moment, with a reset: in the middle of their request's head or body, or at a
random time after it. Beside them others stay, and compare what they get with what the texts have alone. Wrong: a survivor without its
vectors; and, at the end, a text that is still under way or queued, or a server that does not answer.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from campaign import Row, Tally, main
from processes import NAME, TEXTS, Address, ask, connected, forked, idle, request, tiny

_AT_ONCE = 32
_TOLERANCE = 1e-5
_STEPS = 8
_LATEST_SECONDS = 0.05


async def leave(address: Address, rng: random.Random) -> str:
    """Ask for something and leave; return when."""
    content = request("/v1/embeddings", {"model": NAME, "input": rng.choices(TEXTS, k=rng.randint(1, 4)), "steps": _STEPS}, close=False)
    cut = content if rng.random() < 0.7 else content[: rng.randrange(len(content))]
    async with connected(address) as (_, writer):
        with suppress(ConnectionError):
            writer.write(cut)
            await writer.drain()
        await asyncio.sleep(rng.random() * _LATEST_SECONDS if cut is content else 0)
    return "after its request" if cut is content else "in the middle of its request"


async def stay(address: Address, expected: np.ndarray, tally: Tally) -> None:
    """Ask for the vectors of all texts, and compare them."""
    answered = await ask(address, request("/v1/embeddings", {"model": NAME, "input": TEXTS, "steps": _STEPS}))
    apart = 1.0
    if answered.status == 200:
        apart = float(np.abs(np.asarray([one["embedding"] for one in answered.value["data"]]) - expected).max())
    tally.check(apart <= _TOLERANCE, "stays", f"status {answered.status}, apart by {apart:.2g}")


async def measured(address: Address, expected: np.ndarray, size: int, seed: int) -> Tally:
    """Let so many clients leave."""
    tally, rng, places = Tally(), random.Random(seed), asyncio.Semaphore(_AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            if number % 10 == 0:
                await stay(address, expected, tally)
            tally.check(address.alive, await leave(address, rng), "the server has ended")

    await asyncio.gather(*(one(number) for number in range(size)))
    tally.check(await idle(address), "nothing is left behind", "texts are under way or queued though nobody waits")
    await stay(address, expected, tally)
    return tally


def run(size: int, seed: int) -> Tally:
    """Let so many clients of a server leave."""
    with tempfile.TemporaryDirectory() as place:
        embedder = tiny(Path(place))
        expected = embedder.encode(TEXTS, steps=_STEPS)
        with forked(embedder) as address:
            return asyncio.run(measured(address, expected, size, seed))


ROW = Row(
    name="cancellation",
    property="a client that leaves at any moment holds no place, and changes nothing for the others",
    size=10_000,
    unit="clients that leave",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
