"""Requests that schemathesis makes up from the server's own OpenAPI document, right and wrong ones: none is an error of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from genembed import Budget, load
from genembed.serve.limits import Limits
from serving import served

POSTS = ("/v1/embeddings", "/v2/embed", "/embed", "/explore")
GETS = ("/v1/models", "/info", "/health", "/ready", "/metrics", "/explore")


@pytest.fixture(scope="module")
def document(folder_of: Callable[[str], Path]) -> Iterator[schemathesis.BaseSchema]:
    embedder = load(folder_of("qwen2"), dtype="float64", budget=Budget(pack_weights=False))
    with served(embedder, limits=Limits(batch_tokens=8 * (512 + 20), client_batch=4, queue_tokens=4_000)) as (url, _):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_route_is_tried(document: schemathesis.BaseSchema) -> None:
    known = {(operation.ok().method.upper(), operation.ok().path) for operation in document.get_all_operations()}
    assert known == {*(("POST", path) for path in POSTS), *(("GET", path) for path in GETS)}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("path", POSTS)
def test_no_body_is_an_error_of_the_server(path: str, mode: GenerationMode, document: schemathesis.BaseSchema) -> None:
    @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def try_it(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    try_it()


@pytest.mark.parametrize("path", GETS)
def test_no_question_is_an_error_of_the_server(path: str, document: schemathesis.BaseSchema) -> None:
    document[path]["GET"].Case().call_and_validate(checks=[not_a_server_error])
