"""Does any request crash the server, hang it, or make an error of its own?

    python benchmarks/reliability/bad_requests.py [--size 50000]

A server over a tiny model gets `--size` requests of `byte_streams.py`, thirty at a time, and a fifth as many that schemathesis makes up
from the server's own OpenAPI document. Beside them somebody asks for `/health` all the time, and clients hold connections open without
finishing a request. Wrong: a status of 500 or above (but for a text's own deadline), a connection that neither gets an answer nor is
closed within ten seconds of the client's last byte, a server that has ended. Goal: `/health` answers within 100 ms (99 %); the machine is
shared with the clients.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from byte_streams import mutated
from campaign import Row, Tally, main
from processes import Address, Answered, answer, ask, connected, forked, idle, request, tiny

from genembed.serve.limits import Limits

LIMITS = Limits(client_batch=8, request_bytes=1 << 20, queue_tokens=4_000, batch_tokens=8 * (512 + 20), body_seconds=1.0)
END_SECONDS = 10.0
_AT_ONCE = 30
_SLOW = 5
_SCHEMA_SHARE = 5
_POSTS = ("/v1/embeddings", "/v2/embed", "/embed", "/explore")


async def outcome(address: Address, content: bytes) -> Answered | None:
    """Send bytes; return the answer, status 0 for a closed connection, or None if neither comes."""
    try:
        async with asyncio.timeout(END_SECONDS), connected(address) as (reader, writer):
            try:
                writer.write(content)
                await writer.drain()
            except ConnectionError:
                return Answered(0)
            return await answer(reader)
    except TimeoutError:
        return None


async def watch(address: Address, seconds: list[float]) -> None:
    """Ask whether the server lives, again and again."""
    while True:
        begin = time.perf_counter()
        await ask(address, request("/health"))
        seconds.append(time.perf_counter() - begin)
        await asyncio.sleep(0.05)


async def dawdle(address: Address) -> None:
    """Begin requests, and do not end them."""
    while True:
        async with connected(address) as (_, writer):
            writer.write(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Le")
            await asyncio.sleep(LIMITS.body_seconds * 3)


async def streams(address: Address, size: int, seed: int, tally: Tally) -> None:
    """Send so many byte streams."""
    rng, places, seconds = random.Random(seed), asyncio.Semaphore(_AT_ONCE), list[float]()
    beside = [asyncio.ensure_future(work) for work in (watch(address, seconds), *(dawdle(address) for _ in range(_SLOW)))]

    async def one(kind: str, content: bytes) -> None:
        async with places:
            answered = await outcome(address, content)
            right = answered is not None and answered.status < 500 and address.alive
            tally.check(right, kind, f"{content[:200]!r}: {'hangs' if answered is None else answered.status}")

    try:
        for _ in range(0, size, 1_000):
            await asyncio.gather(*(one(*mutated(rng)) for _ in range(min(1_000, size))))
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    tally.check(await idle(address), "nothing is left behind", "texts are under way or queued though nobody waits")
    tally.measure("health_asked", len(seconds))
    tally.measure("health_p99_ms", 1e3 * float(np.quantile(seconds, 0.99)), at_most=100.0)
    tally.measure("health_max_ms", 1e3 * max(seconds))


def made_up(address: Address, size: int, tally: Tally) -> None:
    """Send so many requests that schemathesis makes up, right and wrong ones."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    document = schemathesis.openapi.from_url(f"http://{address.host}:{address.port}/openapi.json")
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for path in _POSTS:
        for mode in modes:

            @settings(max_examples=-(-size // 8), deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
            def try_it(case: schemathesis.Case[Any]) -> None:
                status = case.call().status_code
                tally.check(status < 500, "made up from the schema", f"{case.body!r:.200}: {status}")

            try_it()


def run(size: int, seed: int) -> Tally:
    """Send so many byte streams, and a fifth as many requests made up from the schema."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as place, forked(tiny(Path(place)), limits=LIMITS) as address, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.run(streams(address, size, seed, tally))
        made_up(address, size // _SCHEMA_SHARE, tally)
        tally.check(address.alive, "the server lives", "it has ended")
    return tally


ROW = Row(
    name="bad-requests",
    property="no bytes that a client can send crash the server, hang it, or make an error of its own",
    size=50_000,
    unit="byte streams",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
