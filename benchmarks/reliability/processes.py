"""A server in a process of its own, which can be killed and forked again at once; and clients that need not keep to HTTP."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from campaign import tiny_folder

import genembed
from genembed import Budget, Embedder
from genembed.serve.limits import Limits

NAME = "tiny"
TEXTS = ["a claim", "What is a business trip?", "glucose in patients", "A language model refines the vector of a text step by step."]
_FORK = multiprocessing.get_context("fork")


def tiny(place: Path) -> Embedder:
    """Return a tiny random model in a process without threads, which can be forked; in float64, where rounding does not grow."""
    torch.set_num_threads(1)
    embedder = genembed.load(tiny_folder(place), dtype="float64", budget=Budget(pack_weights=False))
    embedder.encode(TEXTS, steps=1)
    return embedder


def mini() -> Embedder:
    """Return the built-in model in a process without threads, which can be forked."""
    torch.set_num_threads(1)
    embedder = genembed.load("mini", offline=True)
    embedder.encode(TEXTS, steps=1)
    return embedder


@dataclass(frozen=True)
class Address:
    """Where a server listens, and its process."""

    host: str
    port: int
    process: Any = None
    """None for a server in this process."""

    @property
    def alive(self) -> bool:
        """Whether the process is still there."""
        return self.process is None or self.process.is_alive()


def address_of(url: str, process: Any = None) -> Address:
    """Return the parts of a server's address."""
    host, port = url.removeprefix("http://").split(":")
    return Address(host, int(port), process)


@contextmanager
def forked(embedder: Embedder, *, limits: Limits = Limits(), grace: float = 30.0) -> Iterator[Address]:  # noqa: B008
    """Serve a model that is loaded already in a process of its own."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_serve, args=(embedder, limits, grace, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(60):
            raise SystemExit("the server did not start")
        yield address_of(receiver.recv(), process)
    finally:
        receiver.close()
        process.kill()
        process.join()


def _serve(embedder: Embedder, limits: Limits, grace: float, sender: Any) -> None:
    from genembed.serve.run import run

    run(embedder, name=NAME, host="127.0.0.1", port=0, api_key=None, limits=limits, grace=grace, announce=sender.send)


def request(path: str, value: Any = None, *, body: bytes | None = None, close: bool = True) -> bytes:
    """Return the bytes of a request: GET without a body, POST with one."""
    content = b"" if value is None and body is None else json.dumps(value).encode() if body is None else body
    verb = "POST" if content else "GET"
    head = f"{verb} {path} HTTP/1.1\r\nHost: localhost\r\n" + ("Connection: close\r\n" if close else "")
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n" if content else ""
    return f"{head}\r\n".encode() + content


@dataclass(frozen=True)
class Answered:
    """What came back."""

    status: int
    """0 if the connection was closed without an answer."""
    head: bytes = b""
    body: bytes = b""

    @property
    def value(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)


@asynccontextmanager
async def connected(address: Address) -> Any:
    """Connect, and leave without a word."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def ask(address: Address, content: bytes) -> Answered:
    """Send a request on a connection of its own, and return the answer."""
    async with connected(address) as (reader, writer):
        with suppress(ConnectionError):
            writer.write(content)
            await writer.drain()
        return await answer(reader)


async def answer(reader: asyncio.StreamReader) -> Answered:
    """Read one answer; status 0 for none."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return Answered(0)
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    try:
        body = await reader.readexactly(int(length[1])) if length else b""
    except (asyncio.IncompleteReadError, ConnectionError):
        return Answered(0, head)
    return Answered(int(head.split(b" ", 2)[1]), head, body)


async def metric(address: Address, name: str) -> float:
    """Return the sum of one of the server's counters."""
    text = (await ask(address, request("/metrics"))).body.decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


async def idle(address: Address, seconds: float = 30.0) -> bool:
    """Wait until nothing waits and nothing is under way; tell whether that came."""
    try:
        async with asyncio.timeout(seconds):
            while await metric(address, "genembed_rows") or await metric(address, "genembed_queue_tokens"):
                await asyncio.sleep(0.05)
    except TimeoutError:
        return False
    return True
