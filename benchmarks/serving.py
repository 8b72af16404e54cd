"""What does the server cost, beside the engine it runs?

    python benchmarks/serving.py [--model mini] [--steps 20] [--clients 64] [--seconds 20]

A server in a process of its own, and clients in this one, over loopback:

- `offline`      the engine alone on the same queries, as many at once as the server has under way
- `closed loop`  `--clients` clients, each with one text at a time, for so many seconds: texts/s, and its share of `offline`
- `unloaded`     one client, one text at a time: p50, p95
- `half load`    texts that arrive at random (Poisson) at half the closed loop's rate: p50, p95, and p95 to the unloaded one

Clients and server share the machine's cores, so the share of `offline` includes what the clients cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_data import DATA
from markdown import table
from results_file import machine, write

import genembed
from genembed import Budget, FixedSteps
from genembed.files import read_texts

GOALS = {"share": 0.85, "p95_ratio": 3.0}

KEPT_SECONDS = 2.0
"""After which an idle connection is not used again: the server closes it."""


def queries(data: Path, count: int) -> list[str]:
    """Return test queries of SciFact."""
    return [record.text for record in read_texts(data / "retrieval" / "scifact" / "queries.jsonl")][:count]


def offline(model: str, texts: list[str], steps: int, rows: int) -> float:
    """Return texts/s of the engine alone."""
    embedder = genembed.load(model, budget=Budget(max_rows=rows))
    embedder.refine(texts[:rows], halt=FixedSteps(steps))
    begin = time.perf_counter()
    embedder.refine(texts, halt=FixedSteps(steps))
    return len(texts) / (time.perf_counter() - begin)


def started(model: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server; return its process and address."""
    command = [sys.executable, "-m", "genembed.cli", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise SystemExit("the server did not start")


class Connection:
    """One HTTP/1.1 connection that is kept open, with no more to it than that: what clients cost is taken from the server here."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def post(self, path: str, body: bytes) -> bytes:
        """Post some JSON, and return the answer's body."""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
        if not answer.startswith(b"HTTP/1.1 200 ") or length is None:
            raise SystemExit(f"the server answers {answer.decode()!r}")
        return await self.reader.readexactly(int(length[1]))


class Client:
    """Posts one text after the other, and remembers how long each took."""

    def __init__(self, url: str, model: str, texts: list[str], steps: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.host, self.port = host, int(port)
        wish = {"model": model, "steps": steps, "encoding_format": "base64"}
        self.bodies = [json.dumps({**wish, "input": text}).encode() for text in texts]
        self.free: list[tuple[float, Connection]] = []
        """Connections that nobody uses, and since when."""
        self.taken: list[float] = []

    async def post(self) -> None:
        """Post one text."""
        begin = time.perf_counter()
        idle, own = self.free.pop() if self.free else (0.0, None)
        if own is None or begin - idle > KEPT_SECONDS:
            own = Connection(*await asyncio.open_connection(self.host, self.port))
        await own.post("/v1/embeddings", random.choice(self.bodies))
        self.free.append((time.perf_counter(), own))
        self.taken.append(time.perf_counter() - begin)

    async def closed(self, clients: int, seconds: float) -> float:
        """Keep so many requests open; return texts/s."""
        end, self.taken = time.perf_counter() + seconds, []

        async def one() -> None:
            while time.perf_counter() < end:
                await self.post()

        begin = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return len(self.taken) / (time.perf_counter() - begin)

    async def arriving(self, rate: float, seconds: float) -> None:
        """Post texts at random times."""
        end, self.taken = time.perf_counter() + seconds, []
        async with asyncio.TaskGroup() as group:
            while time.perf_counter() < end:
                group.create_task(self.post())
                await asyncio.sleep(random.expovariate(rate))

    def quantiles(self) -> dict[str, float]:
        """Return milliseconds."""
        return {"p50": 1e3 * float(np.median(self.taken)), "p95": 1e3 * float(np.quantile(self.taken, 0.95)), "texts": len(self.taken)}


async def measured(url: str, model: str, texts: list[str], steps: int, clients: int, seconds: float) -> dict[str, Any]:
    """Measure a running server."""
    client = Client(url, model, texts, steps)
    await client.closed(clients, 2.0)  # warms up
    own = time.process_time()
    rate = await client.closed(clients, seconds)
    own, loaded = (time.process_time() - own) / len(client.taken), client.quantiles()
    await client.closed(1, seconds / 2)
    unloaded = client.quantiles()
    await client.arriving(rate / 2, seconds)
    found = {"texts_per_second": rate, "closed_loop": loaded, "unloaded": unloaded, "half_load": client.quantiles()}
    return {**found, "client_cpu_ms": 1e3 * own}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    random.seed(0)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    texts = queries(args.data, 1_000)
    alone = offline(args.model, texts, args.steps, args.clients)
    process, url = started(args.model)
    try:
        found = asyncio.run(measured(url, args.model, texts, args.steps, args.clients, args.seconds))
    finally:
        process.terminate()
        process.wait(60)
    found |= {"offline": alone, "share": found["texts_per_second"] / alone, "goals": GOALS}
    found["p95_ratio"] = found["half_load"]["p95"] / found["unloaded"]["p95"]
    rows = [
        ["offline", f"{alone:.1f}", "", ""],
        [f"{args.clients} clients", f"{found['texts_per_second']:.1f}", *_ms(found["closed_loop"])],
    ]
    rows += [[name, "", *_ms(found[key])] for name, key in (("unloaded", "unloaded"), ("half load", "half_load"))]
    print(table(["", "texts/s", "p50, ms", "p95, ms"], rows))
    path = write("serving", {"model": args.model, "steps": args.steps, "clients": args.clients, **found})
    print(f"written: {path}")
    print(json.dumps({"share": round(found["share"], 3), "p95_ratio": round(found["p95_ratio"], 2)}))


def _ms(own: dict[str, float]) -> list[str]:
    return [f"{own['p50']:.0f}", f"{own['p95']:.0f}"]


if __name__ == "__main__":
    main()
