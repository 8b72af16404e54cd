"""What SECURITY.md says: the key is asked for everywhere, logs hold neither texts nor keys, and nothing is open by default."""

from __future__ import annotations

import inspect
import logging
import re
import tomllib
from collections.abc import Callable
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


def test_logs_and_counters_hold_neither_texts_nor_keys(
    embedder: Embedder, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    with served(embedder, api_key=KEY) as (url, _), httpx.Client(headers={"authorization": f"Bearer {KEY}"}) as client:

        def post(**fields: Any) -> int:
            return client.post(
                f"{url}/v1/embeddings", json={"model": NAME, "input": TEXT, "instruction": TEXT, "steps": 1, **fields}
            ).status_code

        assert [post(), post(steps=99), post(model=TEXT), post(input=[TEXT, 1]), post(halt={"rule": TEXT})] == [200, 400, 404, 400, 400]
        assert client.get(f"{url}/{TEXT}").status_code == 404
        assert httpx.post(f"{url}/embed", json={"inputs": TEXT}, headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
        assert client.post(f"{url}/explore", json={"text": TEXT, "steps": 1}).status_code == 200

        def broken(*_: Any, **__: Any) -> torch.Tensor:
            raise RuntimeError("a kernel failed")

        with monkeypatch.context() as patch:
            patch.setattr(embedder.backbone, "forward_packed", broken)
            assert post() == 500
        counters = client.get(f"{url}/metrics").text
    ours = "\n".join(
        f"{record.name} {record.getMessage()} {record.exc_text}" for record in caplog.records if not record.name.startswith("http")
    )
    everything = ours + counters + "".join(capfd.readouterr())
    assert "a kernel failed" in everything
    for secret in (KEY, TEXT, TEXT.replace(" ", "%20")):
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
