"""What SECURITY.md says: the key is asked for everywhere, logs hold neither texts nor keys, and nothing is open by default."""

from __future__ import annotations

import inspect
import json
import logging
import re
import socket
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from genembed import Budget, Embedder, load
from genembed.cli.serving import serve
from genembed.serve.app import create_app
from genembed.serve.explore import PAGE_FILES
from genembed.serve.limits import Limits
from genembed.serve.service import Service
from serving import NAME, served

ROOT = Path(__file__).resolve().parents[1]
KEY, TEXT = "a-key-of-this-test", "a text of this test that nobody else may read"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


@pytest.fixture
def embedder(folder_of: Callable[[str], Path]) -> Embedder:
    return load(folder_of("qwen2"), dtype="float64", budget=Budget(pack_weights=False))


def test_behind_a_key_every_route_and_method_is_refused_but_the_pages_files(embedder: Embedder) -> None:
    service = Service(embedder, name=NAME, limits=Limits())
    paths = {route.path for route in create_app(service).router.routes}
    service.close(grace=1.0)
    assert paths > {"/v1/embeddings", "/v2/embed", "/embed", "/explore", "/openapi.json", *PAGE_FILES}
    with served(embedder, api_key=KEY) as (url, _), httpx.Client() as client:
        for path in (*paths, "/nowhere", "//health", "/static/../health", "/health/", "/HEALTH", "/static/script.js/x", "/%2e%2e/metrics"):
            for method in METHODS:
                for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": f"bearer {KEY}"}, {"authorization": KEY}):
                    status = client.request(method, url + path, headers=headers).status_code
                    assert status == (200 if method == "GET" and path in PAGE_FILES else 401), (method, path, headers)
        upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-key": "eA==", "sec-websocket-version": "13"}
        assert client.get(f"{url}/health", headers=upgrade).status_code == 401
        assert client.get(f"{url}/health", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


SOUND: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": NAME, "input": TEXT, "instruction": TEXT, "steps": 1},
    "/v2/embed": {"model": NAME, "texts": [TEXT], "input_type": "query", "steps": 1},
    "/embed": {"inputs": TEXT},
    "/explore": {"text": TEXT, "instruction": TEXT, "steps": 1},
}
"""A request of each route that takes texts, with a text that must not be seen again."""


def _posts(routes: Sequence[Any]) -> dict[str, list[str]]:
    """Return the routes that are posted to, with the fields that each documents."""
    posts = {route.path: route.openapi_extra for route in routes if "POST" in route.methods}
    return {path: list(extra["requestBody"]["content"]["application/json"]["schema"]["properties"]) for path, extra in posts.items()}


def _bodies(sound: dict[str, Any], fields: Sequence[str]) -> Iterator[bytes]:
    """Yield a sound body, bodies with the text in the place of every value, and bodies that are none."""
    yield json.dumps(sound).encode()
    for name in (*fields, TEXT):
        for value in (TEXT, [TEXT, {TEXT: 1}]):
            yield json.dumps({**sound, name: value}).encode()
    yield json.dumps({**sound, "padding": TEXT * 2_000}).encode()
    yield from (
        f'{{"{TEXT}'.encode(),
        f'["{TEXT}"]'.encode(),
        TEXT.encode("utf-16"),
        b"[" * 2_000 + TEXT.encode(),
        b'"\xff' + TEXT.encode(),
    )


def _ask_everything(client: httpx.Client, posts: dict[str, list[str]]) -> Counter[int]:
    """Send the text, and the key where it does not belong, by every way there is; return how often each status came."""
    found: Counter[int] = Counter()
    for path, fields in posts.items():
        for body in _bodies(SOUND[path], fields):
            found[client.post(path, content=body, headers={"content-type": "application/json"}).status_code] += 1
        for headers in (
            {"content-type": TEXT},
            {"content-type": "application/json", "content-encoding": "gzip"},
            {"authorization": KEY + "x"},
        ):
            found[client.post(path, content=json.dumps(SOUND[path]), headers=headers).status_code] += 1
        found[client.get(path, params={"text": TEXT, "key": KEY}).status_code] += 1
    for path in (f"/{TEXT}", f"/{KEY}", f"/explore/{TEXT}", f"/?{TEXT}", f"/health?{TEXT}"):
        found[client.get(path, headers={"x-text": TEXT}).status_code] += 1
    return found


def _bytes_to(url: str, content: bytes) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection, suppress(OSError):
        connection.sendall(content)
        connection.recv(1_000)


def _broken(kind: type[Exception]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise kind("a kernel failed")

    return fail


def test_logs_and_counters_hold_neither_texts_nor_keys_by_any_route_and_error(
    embedder: Embedder, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    limits = Limits(client_batch=8, request_bytes=1 << 16)
    with (
        served(embedder, api_key=KEY, limits=limits) as (url, service),
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client,
    ):
        posts = _posts(create_app(service).router.routes)
        assert posts.keys() == SOUND.keys(), "a new route: say what a sound request of it is"
        found = _ask_everything(client, posts)
        assert {200, 400, 401, 404, 413, 415} <= found.keys()
        assert not [status for status in found if status >= 500]
        for fault in (_broken(RuntimeError), _broken(MemoryError), _broken(ValueError), lambda *_, **__: torch.full((1, 32), torch.nan)):
            for name in ("forward_packed", "forward"):
                with monkeypatch.context() as patch:
                    patch.setattr(embedder.backbone, name, fault)
                    for path, sound in SOUND.items():
                        found[client.post(path, json=sound).status_code] += 1
        with monkeypatch.context() as patch:
            patch.setattr(service.embedder.tokenizer, "_encode", _broken(RuntimeError))
            found[client.post("/embed", json=SOUND["/embed"]).status_code] += 1
        assert found[500] > 10
        for content in (
            TEXT.encode(),
            f"GET /{TEXT} HTTP/9\r\n{KEY}: {TEXT}\r\n\r\n".encode(),
            b"GET / HTTP/1.1\r\n" + TEXT.encode() * 5_000,
        ):
            _bytes_to(url, content)
        for sound in SOUND.values():  # a client that leaves
            body = json.dumps(sound).encode()
            _bytes_to(url, b"POST /embed HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (len(body) + 5) + body)
        counters = client.get("/metrics").text
    ours = "\n".join(
        f"{record.name} {record.getMessage()} {record.exc_text}" for record in caplog.records if not record.name.startswith("http")
    )
    everything = ours + counters + "".join(capfd.readouterr())
    assert "a kernel failed" in everything
    for secret in (KEY, TEXT, TEXT[:20], TEXT.replace(" ", "%20"), TEXT.replace(" ", "+")):
        assert secret not in everything


def test_by_default_a_server_listens_on_this_machine_alone_and_answers_no_other_sites_scripts(embedder: Embedder) -> None:
    assert inspect.signature(serve).parameters["host"].default == "127.0.0.1"
    with served(embedder) as (url, _):
        asked = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
        for response in (httpx.get(f"{url}/health", headers=asked), httpx.options(f"{url}/v1/embeddings", headers=asked)):
            assert not [name for name in response.headers if name.startswith("access-control")]
            assert "server" not in response.headers


def test_every_dependency_is_in_the_list_with_its_reason() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [
        line for name, lines in project["optional-dependencies"].items() if name not in ("dev", "docs", "all", "demo") for line in lines
    ]
    names = {re.split(r"[\[<>=;! ]", line, maxsplit=1)[0] for line in [*project["dependencies"], *extras]} - {"genembed"}
    listed = set(re.findall(r"^\| `([A-Za-z0-9_.-]+)` \| \S", text, re.MULTILINE))
    assert names == listed
