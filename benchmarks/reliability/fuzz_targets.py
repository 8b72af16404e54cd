"""What reads bytes from outside, each as a function of bytes: it returns, or raises one of our errors; anything else is a finding."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import torch
from byte_streams import _SOUND
from campaign import tiny_folder
from processes import NAME, request
from pyarrow import parquet
from uvicorn.server import ServerState

import genembed
from genembed import Budget, GenembedError
from genembed.calibrate.certificate import read_rule
from genembed.files import read_texts
from genembed.index.description import DESCRIPTION_FILE, read_description
from genembed.index.html import html_paragraphs
from genembed.jobs.folder import JobFolder
from genembed.jobs.heartbeat import heartbeats
from genembed.jobs.inputs import FORMATS, find_files
from genembed.jobs.plan import Plan, make_plan
from genembed.jobs.rows import read_shard
from genembed.jobs.storage import read_object
from genembed.precision import ranges_from_json
from genembed.records import Columns
from genembed.serve.app import create_app
from genembed.serve.limits import Limits
from genembed.serve.run import config_of
from genembed.serve.service import Service
from genembed.settings import GIRCSE, LASER, ModelSettings
from genembed.source import read_json
from genembed.testsets import json_lines

Target = Callable[[bytes], None]

_MODEL_FILES = ("config.json", "genembed.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Fuzzed:
    """A target, and sound inputs from which others are made."""

    one: Target
    seeds: Sequence[bytes]
    close: Callable[[], None] = lambda: None
    """Ends what was begun for it."""


def made(name: str, place: Path) -> Fuzzed:
    """Return a target; what it needs on the disk is made in `place`."""
    return _TARGETS[name](place)


def names() -> list[str]:
    """Return the names of all targets."""
    return list(_TARGETS)


def tried(one: Target, content: bytes) -> None:
    """Run a target on some bytes; our own errors are what it may end in."""
    with warnings.catch_warnings(), suppress(GenembedError):
        warnings.simplefilter("ignore")
        one(content)


def _objects(place: Path) -> Fuzzed:
    """Settings, rules, ranges: JSON that a model folder, or a user, brings."""
    file = place / "file.json"

    def one(content: bytes) -> None:
        file.write_bytes(content)
        with suppress(GenembedError):
            read_rule(file)
        value = read_json(file)
        with suppress(GenembedError):
            ModelSettings.from_json(value, source="genembed.json")
        ranges_from_json(value, source="ranges.json")

    ranges = {"format_version": 1, "dimensions": {"2": {"minimum": [-0.5, -0.25], "maximum": [0.5, 0.25]}}}
    rule = {"rule": {"rule": "ConvergeStop", "threshold": 0.9, "patience": 2, "min_steps": 1, "max_steps": 5}}
    return Fuzzed(one, [_json(value) for value in (GIRCSE.to_json(), LASER.to_json(), ranges, rule, {"rule": "FixedSteps", "steps": 3})])


def _model_folder(place: Path) -> Fuzzed:
    """One file of a model folder, the first byte says which; the model is loaded and embeds a text."""
    torch.set_num_threads(1)
    sound, folder = tiny_folder(place / "sound"), place / "model"
    budget = Budget(pack_weights=False)
    shutil.copytree(sound, folder)

    def one(content: bytes) -> None:
        name = _MODEL_FILES[content[0] % len(_MODEL_FILES)] if content else "config.json"
        weights = (sound / "model.safetensors").read_bytes()
        spoiled = content[1:] + weights[len(content) - 1 :] if name == "model.safetensors" else content[1:]  # its header alone
        (folder / name).write_bytes(spoiled)
        try:
            genembed.load(folder, offline=True, budget=budget).encode(["a claim"], steps=1)
        finally:
            (folder / name).unlink()
            if (sound / name).exists():
                shutil.copyfile(sound / name, folder / name)

    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(sound), "target_modules": ["q_proj"], "r": 2, "lora_alpha": 4}
    seeds = [bytes([number]) + (sound / name).read_bytes()[:3_000] for number, name in enumerate(_MODEL_FILES[:-1])]
    return Fuzzed(one, [*seeds, bytes([len(_MODEL_FILES) - 1]) + _json(adapter)])


def _job_files(place: Path) -> Fuzzed:
    """What a job's folder holds; the same bytes stand for each of its files."""
    (place / "rows.jsonl").write_text('{"text": "x"}\n' * 3)
    plan = make_plan(find_files([str(place / "rows.jsonl")], None), Columns("text", None), 2)
    folder = JobFolder(place / "job")
    folder.make()

    def one(content: bytes) -> None:
        places = (folder.receipt_file(0), folder.job, folder.rejects_file(0), folder.workers / "x.json", folder.plan)
        for path in places:
            path.write_bytes(content)
        for read in (lambda: folder.read_receipt(0), folder.read_description, lambda: list(folder.read_rejects(0))):
            with suppress(GenembedError):
                read()
        list(heartbeats(folder))
        found = Plan.from_json(read_object(folder.plan))
        for shard in found.shards:
            if all(file.url == plan.files[0].url for file in found.files):  # no other file is opened here
                read_shard(found, shard)

    receipt = {"shard": 0, "rows": 1, "rejects": 0, "bytes": 5, "sha256": "x", "rejects_sha256": None, "steps": 3, "tokens": 4}
    beat = {"host": "here", "process": 1, "worker": 0, "started": 1.0, "updated": 1.0}
    description = {"format_version": 1, "identity": {"model": "x"}, "origin": {}, "max_rejects": 0, "output": "parquet"}
    reject = {"number": 0, "id": "x", "place": "rows.jsonl, line 1", "reason": "none"}
    return Fuzzed(one, [_json(value) for value in (plan.to_json(), {**receipt, "truncated": 0}, beat, description, reject)])


def _texts(place: Path) -> Fuzzed:
    """A file of rows, the first byte says of which format, and whether it is compressed; read at once, and as the input of a job."""

    def one(content: bytes) -> None:
        kind, compressed = FORMATS[content[0] % len(FORMATS)] if content else "txt", content[:1] > b"\x7f"
        path = place / f"rows.{kind}{'.gz' if compressed else ''}"
        path.write_bytes(content[1:])
        id_column = None if kind == "txt" else "id"
        with suppress(GenembedError):
            if not compressed:
                list(read_texts(path, id_column=id_column))
        with suppress(GenembedError):
            if kind == "jsonl":
                list(json_lines(path))
        plan = make_plan(find_files([str(path)], None), Columns("text", id_column), 2)
        for shard in plan.shards:
            read_shard(plan, shard)

    rows = b'{"text": "a", "id": 1}\n{"text": "\\u00fc", "id": "x"}\n\n{"text": 5}\n'
    table = b'text,id\n"a, b",1\n"two\nlines",2\n\n'
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["a", "b" * 20], "id": [1, 2]}), sink, compression="zstd")
    plain = [b"\0" + rows, b"\1" + table, b"\2" + sink.getvalue().to_pybytes(), b"\3one\ntwo\r\nthree"]
    return Fuzzed(one, [*plain, b"\x80" + gzip.compress(rows, mtime=0), b"\x81" + gzip.compress(table, mtime=0)])


def _pages(place: Path) -> Fuzzed:
    """A web page, and an index's description."""

    def one(content: bytes) -> None:
        (place / DESCRIPTION_FILE).write_bytes(content)
        with suppress(GenembedError):
            read_description(place)
        list(html_paragraphs(content, "page.html"))

    page = b"<!DOCTYPE html><html><head><meta charset='utf-8'><title>t</title></head><body><p>a<br>b&#233;<!-- c --><td>d</body></html>"
    known = {"format_version": 1, "model": "mini", "dimensions": 2, "halt": "x", "instruction": None, "fingerprint": "x", "passages": "x"}
    return Fuzzed(one, [page, b"\xff\xfe<\0p\0>\0", _json({**known, "rows": 0, "steps": 0.0, "seconds": 0.0})])


class _Wire(asyncio.Transport):
    """A connection whose other end keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.sent = io.BytesIO()
        self.closed = False

    def write(self, data: Any) -> None:
        self.sent.write(data)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Serve no other protocol."""

    def pause_reading(self) -> None:
        """Be read no faster."""

    def resume_reading(self) -> None:
        """Be read no slower."""


class _Wrong(Exception):  # noqa: N818 - a finding
    """The server's own error."""


class _Server:
    """A server without a network: one connection after another, each with all of its bytes at once, or in two parts."""

    def __init__(self, place: Path) -> None:
        torch.set_num_threads(1)
        limits = Limits(client_batch=4, request_bytes=1 << 16, queue_tokens=4_000, batch_tokens=4 * (512 + 20), body_seconds=5.0)
        embedder = genembed.load(tiny_folder(place), budget=Budget(pack_weights=False))
        service = Service(embedder, name=NAME, limits=limits)
        self.service, self.loop = service, asyncio.new_event_loop()
        self.config = config_of(create_app(service), limits=limits, grace=1.0)
        self.config.load()

    def close(self) -> None:
        self.service.close(grace=1.0)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def one(self, content: bytes) -> None:
        self.loop.run_until_complete(self._served(content))

    async def _served(self, content: bytes) -> None:
        wire, state = _Wire(), ServerState()
        connect: Any = self.config.http_protocol_class
        protocol = connect(config=self.config, server_state=state, app_state={}, _loop=self.loop)
        protocol.connection_made(wire)
        for part in (content[: len(content) // 2], content[len(content) // 2 :]):
            if not wire.closed:
                protocol.data_received(part)
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=0.5)
        protocol.connection_lost(None)
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=10)
        if state.tasks:
            raise _Wrong("a request outlives its connection")
        answer = wire.sent.getvalue()
        if answer[:10] == b"HTTP/1.1 5" and b"deadline_exceeded" not in answer:
            raise _Wrong(answer[:300])


def _http_heads(place: Path) -> Fuzzed:
    """All bytes of a connection."""
    sound = [request(path, body) for path, body in _SOUND]
    chunked = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    server = _Server(place)
    return Fuzzed(server.one, [*sound, chunked + b'f\r\n{"inputs": "x"}\r\n0\r\nX: y\r\n\r\n', b"GET / HTTP/1.0\r\n\r\n"], server.close)


def _http_bodies(place: Path) -> Fuzzed:
    """The body of a request, the first byte says of which route."""
    server, paths = _Server(place), [path for path, _ in _SOUND]

    def one(content: bytes) -> None:
        server.one(request(paths[content[0] % len(paths)] if content else paths[0], body=content[1:] or b"{}"))

    full = {**_SOUND[0][1], "halt": {"rule": "ConvergeStop", "threshold": 0.9}, "dimensions": 32, "encoding_format": "base64"}
    seeds = [bytes([number]) + _json(body) for number, (_, body) in enumerate(_SOUND)]
    more = b"\0" + _json({**full, "deadline_ms": 500, "truncate": "right", "instruction": "find", "user": "me"})
    return Fuzzed(one, [*seeds, more], server.close)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


_TARGETS: dict[str, Callable[[Path], Fuzzed]] = {
    "objects": _objects,
    "model-folder": _model_folder,
    "job-files": _job_files,
    "texts": _texts,
    "pages": _pages,
    "http-heads": _http_heads,
    "http-bodies": _http_bodies,
}
