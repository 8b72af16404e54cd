"""The server as its clients see it: what it answers, in whose shape, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from genembed import Budget, ConvergeStop, Embedder, FixedSteps, load
from genembed.cli.serving import _key
from genembed.errors import ConfigurationError
from genembed.precision import Ranges, truncate
from genembed.serve.limits import Limits
from genembed.serve.service import SHORT_CHARACTERS, Service
from serving import NAME, served

TEXTS = ["a claim", "What is a business trip?", "A language model refines the vector of a text step by step."]
LIMITS = Limits(
    batch_tokens=8 * (512 + 20), client_batch=4, request_bytes=20_000, queue_tokens=4_000, concurrent_requests=8, body_seconds=0.5
)


Patch = pytest.MonkeyPatch


@pytest.fixture
def patch(monkeypatch: Patch) -> Patch:
    return monkeypatch


@pytest.fixture(scope="module")
def embedder(folder_of: Callable[[str], Path]) -> Embedder:
    return load(folder_of("qwen2"), dtype="float64", budget=Budget(pack_weights=False))


@pytest.fixture(scope="module")
def server(embedder: Embedder) -> Iterator[tuple[str, Service]]:
    with served(embedder, limits=LIMITS) as found:
        yield found


@pytest.fixture
def url(server: tuple[str, Service]) -> str:
    return server[0]


def embed(url: str, path: str = "/v1/embeddings", **fields: Any) -> httpx.Response:
    named = {"model": NAME} if path != "/embed" else {}
    return httpx.post(url + path, json={**named, **fields}, timeout=30)


def vectors(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.asarray([one["embedding"] for one in response.json()["data"]], dtype=np.float32)


def test_codes_and_trained_cuts_are_answered_and_others_refused_before_anything_is_embedded(embedder: Embedder) -> None:
    model = copy.copy(embedder)
    model.settings = replace(embedder.settings, matryoshka_dims=(8,))
    expected = embedder.encode(TEXTS, steps=2)
    model.ranges = {dims: Ranges.of(truncate(np.concatenate([expected, -expected]), dims)) for dims in (8, 32)}
    with served(model, limits=LIMITS) as (url, _):
        cut = truncate(expected, 8)
        np.testing.assert_allclose(vectors(embed(url, input=TEXTS, steps=2, dimensions=8)), cut, atol=1e-5)
        asked = {"texts": TEXTS, "input_type": "search_document", "steps": 2, "output_dimension": 8}
        given = embed(url, "/v2/embed", **asked, embedding_types=["int8", "ubinary", "float"]).json()["embeddings"]
        np.testing.assert_allclose(given["float"], cut, atol=1e-5)
        np.testing.assert_array_equal(given["ubinary"], np.packbits(cut > 0, axis=-1))
        assert np.abs(np.asarray(given["int8"]) - model.form("int8", 8)(cut)).max() <= 1
        assert "trained to give 8, 32 dimensions" in embed(url, "/embed", inputs=TEXTS, dimensions=16).text
        model.ranges = {}
        refused = embed(url, "/v2/embed", **asked, embedding_types=["int8"])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "embedding_types")
        assert "the model has no ranges for vectors of 8 dimensions" in refused.text


def test_openai_answers_are_the_embedders_vectors_with_usage_and_metadata(url: str, embedder: Embedder) -> None:
    expected = embedder.refine(TEXTS, steps=3)
    response = embed(url, input=TEXTS, steps=3)
    np.testing.assert_allclose(vectors(response), expected.vectors, atol=1e-5)
    body = response.json()
    assert (body["object"], body["model"], [one["index"] for one in body["data"]]) == ("list", NAME, [0, 1, 2])
    assert body["usage"] == {"prompt_tokens": int(expected.tokens.sum()), "total_tokens": int(expected.tokens.sum())}
    assert body["metadata"] == {"steps": [3, 3, 3], "truncated": [False] * 3, "complete": [True] * 3}
    np.testing.assert_allclose(vectors(embed(url, input=TEXTS[0], steps=3)), expected.vectors[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("wish", "options"),
    [
        ({"halt": {"rule": "ConvergeStop", "threshold": 0.9, "max_steps": 5}}, {"halt": ConvergeStop(0.9, max_steps=5)}),
        ({"instruction": "Find it", "steps": 2}, {"instruction": "Find it", "steps": 2}),
        ({"input_type": "search_document", "steps": 2}, {"steps": 2}),
        ({"task": "classification", "steps": 2}, {"steps": 2}),
        ({}, {"halt": FixedSteps(20)}),
    ],
)
def test_a_request_says_when_to_halt_and_what_the_texts_are_for(
    url: str, embedder: Embedder, wish: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = embedder.refine(TEXTS, **options)
    response = embed(url, input=TEXTS, **wish)
    np.testing.assert_allclose(vectors(response), expected.vectors, atol=1e-3)
    assert response.json()["metadata"]["steps"] == expected.steps.tolist()


def test_a_deadline_gives_the_best_vector_there_is_and_says_so(url: str) -> None:
    metadata = embed(url, input=TEXTS[:1], steps=20, deadline_ms=0.001).json()["metadata"]
    assert metadata["complete"] == [False]
    assert 1 <= metadata["steps"][0] < 20


def test_base64_is_little_endian_float32(url: str) -> None:
    body = embed(url, input=TEXTS, steps=2, encoding_format="base64").json()
    found = np.stack([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in body["data"]])
    np.testing.assert_allclose(found, vectors(embed(url, input=TEXTS, steps=2)), atol=1e-6)


def test_texts_that_are_too_long_are_refused_or_cut_and_flagged(url: str, embedder: Embedder) -> None:
    long = "step " * 600
    refused = embed(url, input=["a", long], steps=1)
    assert refused.status_code == 400
    assert "text 1 does not fit into the model's 512 tokens" in refused.json()["error"]["message"]
    cut = embed(url, input=["a", long], steps=1, truncate="right")
    assert cut.json()["metadata"]["truncated"] == [False, True]
    assert embed(url, "/embed", inputs=long).status_code == 400
    assert embed(url, "/embed", inputs=long, truncate=True).status_code == 200
    assert embed(url, "/v2/embed", texts=[long], input_type="search_document", truncate="NONE").status_code == 400


def test_cohere_and_tei_clients_get_their_shapes(url: str, embedder: Embedder) -> None:
    expected = embedder.encode(TEXTS)
    cohere = embed(url, "/v2/embed", texts=TEXTS, input_type="search_document", embedding_types=["float", "base64"]).json()
    np.testing.assert_allclose(np.asarray(cohere["embeddings"]["float"]), expected, atol=1e-3)
    assert len(cohere["embeddings"]["base64"]) == len(TEXTS)
    assert (cohere["response_type"], cohere["texts"]) == ("embeddings_by_type", TEXTS)
    assert cohere["meta"]["metadata"]["steps"] == [20] * 3
    np.testing.assert_allclose(np.asarray(embed(url, "/embed", inputs=TEXTS).json()), expected, atol=1e-3)
    info = httpx.get(f"{url}/info").json()
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == (NAME, 512, 4)
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == NAME


def test_the_openai_client_works_and_its_extras_pass_through(url: str, embedder: Embedder) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    made = client.embeddings.create(model=NAME, input=TEXTS, extra_body={"steps": 2})
    np.testing.assert_allclose(np.asarray([one.embedding for one in made.data]), embedder.encode(TEXTS, steps=2), atol=1e-5)
    with pytest.raises(openai.NotFoundError, match="'other' is not served here, but 'tiny' is"):
        client.embeddings.create(model="other", input="x")
    with pytest.raises(openai.BadRequestError, match="steps=2 and halt="):
        client.embeddings.create(model=NAME, input="x", extra_body={"steps": 2, "halt": {"rule": "FixedSteps", "steps": 3}})
    assert [model.id for model in client.models.list()] == [NAME]


@pytest.mark.slow
def test_langchains_token_arrays_are_refused_with_the_setting_that_cures_them(url: str, embedder: Embedder) -> None:
    from langchain_openai import OpenAIEmbeddings  # takes seconds

    arrays = embed(url, input=[[1, 2], [3]])
    assert arrays.status_code == 400
    assert "check_embedding_ctx_length=False" in arrays.json()["error"]["message"]
    assert embed(url, input=[1, 2, 3]).status_code == 400
    cured = OpenAIEmbeddings(model=NAME, base_url=f"{url}/v1", api_key="unused", check_embedding_ctx_length=False)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.asarray(cured.embed_documents(TEXTS)), embedder.encode(TEXTS), atol=1e-3)
    np.testing.assert_allclose(np.asarray(cured.embed_query(TEXTS[0])), embedder.encode(TEXTS[0]), atol=1e-3)


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"input": []}, 400, "input is empty"),
    ({"input": [""]}, 400, "has no tokens"),
    ({"input": ["a"] * 5}, 413, "5 texts in one request; at most 4"),
    ({"input": {"a": 1}}, 400, "input"),
    ({"input": ["a", 1]}, 400, "input"),
    ({"input": None}, 400, "input"),
    ({}, 400, "input: Field required"),
    ({"input": "a", "steps": -1}, 400, "steps: Input should be greater than or equal to 0"),
    ({"input": "a", "steps": 21}, 400, "asks for 21 steps; this server does at most 20"),
    ({"input": "a", "steps": 0}, 400, "pools generated states only"),
    ({"input": "a", "steps": 2.5}, 400, "steps"),
    ({"input": "a", "steps": "2"}, 400, "steps"),
    ({"input": "a", "halt": {"rule": "Never"}}, 400, "'Never' is unknown"),
    ({"input": "a", "halt": {"rule": "ConvergeStop", "threshold": 0.9, "patience": 9}}, 400, "patience=9: at most 8"),
    ({"input": "a", "deadline_ms": 0}, 400, "deadline_ms=0"),
    ({"input": "a", "deadline_ms": True}, 400, "deadline_ms: Input should be a valid number; got True"),
    ({"input": "a", "deadline_ms": "5"}, 400, "deadline_ms: Input should be a valid number"),
    ({"input": "a", "dimensions": True}, 400, "dimensions: Input should be a valid integer; got True"),
    ({"input": "a", "dimensions": 16}, 400, "dimensions=16: this model was not trained to give fewer than 32 dimensions"),
    ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
    ({"input": "a", "input_type": "poem"}, 400, "'poem' is no purpose"),
    ({"input": "a", "input_type": "query", "instruction": "x"}, 400, "both say what the texts are for"),
    ({"input": "a", "input_type": "query", "task": "query"}, 400, "all say what the texts are for"),
    ({"input": "a", "truncate": "left"}, 400, "truncate"),
    ({"input": "a", "model": "other"}, 404, "'other' is not served here"),
]


@pytest.mark.parametrize(("fields", "status", "message"), BAD, ids=[message for _, _, message in BAD])
def test_what_cannot_be_served_is_refused_with_the_field_and_the_reason(
    url: str, fields: dict[str, Any], status: int, message: str
) -> None:
    response = embed(url, **fields)
    error = response.json()["error"]
    assert response.status_code == status
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


RAW: list[tuple[bytes, dict[str, str], int]] = [
    (b"", {}, 400),
    (b"{", {}, 400),
    (b"[1]", {}, 400),
    (b'"text"', {}, 400),
    (b"[" * 10_000, {}, 400),
    (b'{"model": "tiny", "input": ' + b"[" * 1_000 + b"]" * 1_000 + b"}", {}, 400),
    (b'{"model": "tiny", "input": "a", "steps": ' + b"[" * 1_000 + b"]" * 1_000 + b"}", {}, 400),
    (b'{"model": "tiny", "input": "a", "halt": {"rule": ' + b"[" * 1_000 + b"]" * 1_000 + b"}}", {}, 400),
    (b'{"model": "tiny", "input": [' + b"null," * 3_000 + b"null]}", {}, 400),
    (b'{"model": "tiny", "input": "\\ud800"}', {}, 400),
    (b'{"model": "tiny", "input": NaN}', {}, 400),
    (b"\xff\xfe", {}, 400),
    (b'{"model": "tiny", "input": "a"}', {"content-type": "text/plain"}, 415),
    (b'{"model": "tiny", "input": "a"}', {"content-encoding": "gzip"}, 415),
    (json.dumps({"model": "tiny", "input": "a " * 20_000}).encode(), {}, 413),
]


@pytest.mark.parametrize(("body", "headers", "status"), RAW, ids=[f"{body[:24]!r}, {status}" for body, _, status in RAW])
def test_bytes_that_are_no_request_are_refused(url: str, body: bytes, headers: dict[str, str], status: int) -> None:
    response = httpx.post(f"{url}/v1/embeddings", content=body, headers={"content-type": "application/json", **headers})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def test_a_body_without_an_end_is_cut_off(url: str) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 4_096

    with httpx.Client() as client:
        try:
            response = client.post(f"{url}/v1/embeddings", content=endless(), headers={"content-type": "application/json"})
        except (httpx.WriteError, httpx.RemoteProtocolError):  # the server closed while we still wrote
            assert httpx.get(f"{url}/health").status_code == 200
        else:
            assert response.status_code == 413


def test_limits_hold_at_the_limit_and_not_one_above_it(embedder: Embedder) -> None:
    words = {count: "step " * count for count in range(1, 600)}
    longest = max(count for count, text in words.items() if not embedder.tokenizer([text]).truncated[0])
    body = json.dumps({"model": NAME, "input": "a", "user": ""}).encode()
    with served(embedder, limits=replace(LIMITS, request_bytes=len(body) + 1)) as (url, _):
        post = partial(httpx.post, f"{url}/v1/embeddings", headers={"content-type": "application/json"})
        assert [post(content=body.replace(b'""', b'"' + b"x" * extra + b'"')).status_code for extra in (0, 1, 2)] == [200, 200, 413]
    with served(embedder, limits=replace(LIMITS, queue_tokens=embedder.settings.max_length)) as (url, _):
        assert [embed(url, input=words[count]).status_code for count in (longest, longest + 1)] == [200, 400]
        assert [embed(url, input=["step"] * count).status_code for count in (4, 5)] == [200, 413]
        halts = [{"rule": "ConvergeStop", "threshold": 0.9, "patience": patience} for patience in (8, 9)]
        assert [embed(url, input="a", halt=halt).status_code for halt in halts] == [200, 400]
        fields = [{"rule": "FixedSteps", "max_steps": 1} | {f"unknown {n}": n for n in range(more)} for more in (6, 7)]
        said = [embed(url, input="a", halt=halt).json()["error"]["message"] for halt in fields]
        assert ["an object of plain values" in one for one in said] == [False, True]
        assert [embed(url, input="a", steps=1, deadline_ms=ms).status_code for ms in (1e-3, 0)] == [200, 400]
        assert [embed(url, input="a", steps=steps).status_code for steps in (20, 21)] == [200, 400]
        assert int(embedder.tokenizer([words[longest]]).tokens[0]) > embedder.settings.max_length - 3
        assert embed(url, input=[words[longest], words[3]]).json()["error"]["message"].endswith("send several.")


def test_open_requests_are_counted_and_whoever_watches_is_let_in(embedder: Embedder, patch: Patch) -> None:
    with served(embedder, limits=replace(LIMITS, concurrent_requests=2)) as (url, service):
        held, answers = Held(embedder, patch), list[int]()
        clients = [threading.Thread(target=lambda: answers.append(embed(url, input="a", steps=1).status_code)) for _ in range(2)]
        for one in clients:
            one.start()
        assert held.reached.wait(30)
        until(lambda: bool(service.live.under_way and service.live.queued_tokens))
        assert embed(url, input="a").status_code == 429
        assert httpx.get(f"{url}/health").status_code == 200
        assert "genembed_rows" in httpx.get(f"{url}/metrics").text
        held.free.set()
        for one in clients:
            one.join(30)
        assert answers == [200, 200]


def test_a_text_at_fault_is_named(url: str, embedder: Embedder, patch: Patch) -> None:
    poison, whole = int(embedder.tokenizer(["zebra"]).ids[0][0]), embedder.backbone.embed
    patch.setattr(embedder.backbone, "embed", lambda ids: whole(ids).masked_fill((ids == poison)[..., None], torch.nan))
    response = embed(url, input=["a", "zebra", "b"], steps=1)
    assert response.status_code == 500
    assert response.json()["error"]["message"].startswith("text 1: the embedding is not finite")


def test_a_deadline_that_passes_in_the_queue_is_429_as_no_body_is_an_error_of_the_server(embedder: Embedder, patch: Patch) -> None:
    with served(embedder, limits=replace(LIMITS, batch_tokens=512 + 20)) as (url, service):  # one place
        held, answers = Held(embedder, patch), dict[str, httpx.Response]()
        bodies: dict[str, dict[str, Any]] = {"first": {"steps": 20}, "late": {"deadline_ms": 1}}
        clients = {
            name: threading.Thread(target=lambda name=name: answers.setdefault(name, embed(url, input="a", **bodies[name])))
            for name in bodies
        }
        clients["first"].start()
        assert held.reached.wait(30)
        clients["late"].start()
        until(lambda: service.live.queued_tokens > 0)
        time.sleep(0.05)
        held.free.set()
        for one in clients.values():
            one.join(30)
        assert answers["first"].status_code == 200
        assert (answers["late"].status_code, answers["late"].json()["error"]["code"]) == (429, "deadline_exceeded")
        assert answers["late"].headers["retry-after"] == "1"


def test_a_client_that_never_finishes_its_request_is_told_so(url: str) -> None:
    def slow() -> Iterator[bytes]:
        yield b'{"model": '
        time.sleep(1.5)
        yield b'"tiny"}'

    response = httpx.post(f"{url}/v1/embeddings", content=slow(), headers={"content-type": "application/json"}, timeout=10)
    assert response.status_code == 408


def raw(url: str, *parts: bytes, wait: float = 0.0) -> bytes:
    """Send bytes, with a pause between the parts, and return whatever comes until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as client, contextlib.suppress(ConnectionError):
        for part in parts:
            client.sendall(part)
            time.sleep(wait)
        while chunk := client.recv(65_536):
            received += chunk
    return received


def test_a_connection_on_which_no_head_arrives_is_closed(url: str) -> None:
    """Silent or trickling clients held a connection for ever, and as many of them as files may be open the whole server."""
    assert raw(url).startswith(b"HTTP/1.1 408 ")
    assert raw(url, b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n").startswith(b"HTTP/1.1 408 ")
    assert b"HTTP/1.1 408 " in raw(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health", wait=0.1)
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answered = raw(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", last, wait=0.7)
    assert answered.count(b"HTTP/1.1 200 ") == 2, "a connection that was of use is kept open"


def test_a_head_without_an_end_is_cut_off(url: str) -> None:
    """Whatever came before the end of the head was kept in memory."""
    received = raw(url, b"GET /health HTTP/1.1\r\nX: ", *[b"x" * 65_536] * 4)
    assert received == b"" or received.startswith(b"HTTP/1.1 431 ")  # a reset may overtake the answer
    long = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: " + b"x" * 60_000 + b"\r\n\r\n"
    assert raw(url, long).startswith(b"HTTP/1.1 200 ")


def test_the_key_is_asked_for_on_every_route(embedder: Embedder) -> None:
    with served(embedder, limits=LIMITS, api_key="secret") as (url, _service):
        paths = ("/health", "/ready", "/metrics", "/info", "/v1/models", "/openapi.json", "/nowhere")
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            assert {httpx.get(url + path, headers=headers).status_code for path in paths} == {401}
            assert httpx.post(f"{url}/v1/embeddings", json={}, headers=headers).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).embeddings.create(model=NAME, input="a")
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="secret").embeddings.create(model=NAME, input="a").data


@pytest.mark.parametrize(("content", "problem"), [("", "one line"), ("two words", "one line"), ("schl\u00fcssel", "one line")])
def test_a_key_file_without_a_key_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(ConfigurationError, match=problem):
        _key(tmp_path / "key")
    (tmp_path / "key").write_text("abc\n")
    assert _key(tmp_path / "key") == "abc"


def test_health_metrics_and_unknown_routes(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "alive"}
    assert httpx.get(f"{url}/ready").status_code == 200
    assert httpx.get(f"{url}/nowhere").json()["error"]["message"] == "/nowhere: Not Found."
    assert httpx.get(f"{url}/v1/embeddings").status_code == 405
    lines = httpx.get(f"{url}/metrics").text
    assert 'genembed_requests_total{route="/ready",status="200"}' in lines
    assert 'route="other",status="404"' in lines
    assert "nowhere" not in lines
    for name in ("genembed_queue_tokens", "genembed_rows", "genembed_texts_total", "genembed_steps_total"):
        assert f"\n{name} " in lines


class Held:
    """A model that reads nothing until it is let go."""

    def __init__(self, embedder: Embedder, patch: Patch) -> None:
        self.free, self.reached = threading.Event(), threading.Event()
        forward = embedder.backbone.forward_packed

        def held(*arguments: Any, **options: Any) -> torch.Tensor:
            self.reached.set()
            assert self.free.wait(30)
            return forward(*arguments, **options)

        patch.setattr(embedder.backbone, "forward_packed", held)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def test_a_full_queue_is_429_with_a_time_to_come_back_and_nothing_is_lost(
    server: tuple[str, Service], embedder: Embedder, patch: Patch
) -> None:
    url, service = server
    held, answers = Held(embedder, patch), []
    texts = ["step " * 300] * 4

    def client() -> None:
        answers.append(embed(url, input=texts, steps=1).status_code)

    clients = [threading.Thread(target=client) for _ in range(5)]
    for one in clients:
        one.start()
    assert held.reached.wait(30)
    deadline = time.monotonic() + 30
    while service.live.queued_tokens < 3_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    refused = embed(url, input=texts, steps=1)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(refused.headers["retry-after"]) >= 1
    held.free.set()
    for one in clients:
        one.join(30)
    assert sorted(answers) in ([200] * 5, [200] * 4 + [429], [200] * 3 + [429] * 2)
    assert service.live.queued_tokens == 0


def test_a_full_queue_refuses_before_anything_is_tokenised(embedder: Embedder, patch: Patch) -> None:
    with served(embedder, limits=replace(LIMITS, queue_tokens=3, batch_tokens=512 + 20)) as (url, service):
        held, tokenised = Held(embedder, patch), list[int]()
        waiting = [threading.Thread(target=lambda: embed(url, input="a", steps=1)) for _ in range(1 + 3)]
        waiting[0].start()
        assert held.reached.wait(30)
        for one in waiting[1:]:
            one.start()
        until(lambda: service.live.queued_tokens == 3)
        whole = service._tokenise
        patch.setattr(service, "_tokenise", lambda texts, *others: (tokenised.append(len(texts)), whole(texts, *others))[1])
        assert embed(url, input=["a", "b"]).status_code == 429
        assert tokenised == []
        held.free.set()
        for one in waiting:
            one.join(30)
        assert embed(url, input=["a", "b"], steps=1).status_code == 200
        assert tokenised == [2]


def test_short_texts_are_tokenised_at_once_unless_the_tokenizer_is_at_work(server: tuple[str, Service], patch: Patch) -> None:
    url, service = server
    names, whole = list[str](), service._tokenise

    def noted(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return whole(*arguments)

    patch.setattr(service, "_tokenise", noted)
    answers = [embed(url, input="a" * length, steps=1, truncate="right") for length in (SHORT_CHARACTERS, SHORT_CHARACTERS + 1)]
    with service._tokenizer_is_used:
        late = threading.Thread(target=lambda: answers.append(embed(url, input="a", steps=1)))
        late.start()
        assert httpx.get(f"{url}/health").status_code == 200  # the loop goes on
        time.sleep(0.2)
        assert len(answers) == 2
    late.join(30)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [name.startswith("genembed-tokenizer") for name in names] == [False, True, True]


def test_a_client_that_leaves_frees_its_rows(server: tuple[str, Service], embedder: Embedder, patch: Patch) -> None:
    url, service = server
    held = Held(embedder, patch)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/embeddings", json={"model": NAME, "input": TEXTS, "steps": 20}, timeout=0.5)
    done = service.live.steps_done
    held.free.set()
    deadline = time.monotonic() + 30
    while service.live.under_way and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.live.under_way == 0
    assert service.live.steps_done - done <= 3 * 2


def test_a_frozen_engine_is_not_ready_and_a_busy_one_is(server: tuple[str, Service], embedder: Embedder, patch: Patch) -> None:
    url, _service = server
    patch.setattr("genembed.serve.service.SILENT_SECONDS", 0.3)
    held = Held(embedder, patch)
    waiting = threading.Thread(target=lambda: embed(url, input="a", steps=1))
    waiting.start()
    assert held.reached.wait(30)
    time.sleep(0.5)
    assert httpx.get(f"{url}/ready").status_code == 503
    assert httpx.get(f"{url}/health").status_code == 200
    held.free.set()
    waiting.join(30)
    patch.setattr("genembed.serve.service.SILENT_SECONDS", 5.0)
    assert httpx.get(f"{url}/ready", timeout=20).status_code == 200


def test_an_error_that_nobody_expected_is_logged_and_tells_the_client_nothing(
    url: str, embedder: Embedder, patch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("a secret path")

    patch.setattr(embedder.backbone, "forward_packed", broken)
    response = embed(url, input="a", steps=1)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert "a secret path" in caplog.text


def test_a_limit_that_the_models_own_rule_exceeds_is_refused(embedder: Embedder) -> None:
    with pytest.raises(ConfigurationError, match=r"steps=5: the model's own rule is FixedSteps\(steps=20\); allow as many steps"):
        Service(embedder, name=NAME, limits=Limits(steps=5))


def test_as_many_steps_as_the_models_own_rule_needs_are_enough_and_one_fewer_is_not(embedder: Embedder) -> None:
    steps = embedder.settings.halt.max_steps
    assert Service(embedder, name=NAME, limits=Limits(steps=steps)).close(grace=10.0)
    with pytest.raises(ConfigurationError, match=f"steps={steps - 1}"):
        Service(embedder, name=NAME, limits=Limits(steps=steps - 1))


def test_limits_that_cannot_hold_a_text_are_refused() -> None:
    assert [Limits(batch_tokens=tokens).rows(512) for tokens in (532, 1_063, 1_064)] == [1, 1, 2]
    with pytest.raises(ConfigurationError, match="batch_tokens=531: one text of 512 tokens and 20 steps needs 532"):
        Limits(batch_tokens=531).rows(512)
    with pytest.raises(ConfigurationError, match="batch_tokens=100: one text of 512 tokens and 20 steps needs 532"):
        Limits(batch_tokens=100).rows(512)
    with pytest.raises(ConfigurationError, match="client_batch=0: must be at least 1"):
        Limits(client_batch=0)
