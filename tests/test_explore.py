"""The explorer: what it shows is what the reference loop does, and its page is open while its answers are not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import doubles
from genembed import Budget, ConfigurationError, ConvergeStop, Embedder, FixedSteps, ModelSettings, NonFiniteError, cli, load
from genembed.cost import Cost, Shape
from genembed.errors import InputError
from genembed.index import Index, Passage
from genembed.serve import explore as module
from genembed.serve.app import create_app
from genembed.serve.explore import PAGE_FILES, Explorer, explore
from genembed.serve.limits import Limits
from genembed.serve.service import Service
from genembed.spoken import new_tokens, spoken_tokens

TEXT = "What is a business trip?"
PASSAGES = [
    Passage(text, f"row {row}", f"about {text}") for row, text in enumerate(["business trips", "fasting glucose", "a stitch in time"])
]
Loaded = Callable[..., Embedder]


def ruled(rule: FixedSteps | ConvergeStop, **changes: Any) -> ModelSettings:
    return replace(doubles.PREFIX, halt=rule, **changes)


@pytest.fixture(scope="module")
def bert(folder_of: Callable[[str], Path]) -> Embedder:
    preset = ruled(ConvergeStop(threshold=0.9, max_steps=6))
    return load(folder_of("bert"), preset=preset, dtype="float64", budget=Budget(pack_weights=False))


@pytest.fixture(scope="module")
def qwen(folder_of: Callable[[str], Path]) -> Embedder:
    return load(folder_of("qwen2"), dtype="float64", budget=Budget(pack_weights=False))


@pytest.fixture(scope="module")
def index(bert: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(tmp_path_factory.mktemp("index") / "texts", bert, PASSAGES, halt=FixedSteps(3))


@pytest.mark.parametrize("family", ["qwen2", "bert"])
@pytest.mark.parametrize("instruction", [None, "Find similar texts."])
def test_tokens_and_cosines_are_those_of_the_reference_loop(family: str, instruction: str | None, embedder_of: Loaded) -> None:
    embedder = embedder_of(family)
    seen = explore(embedder, TEXT, instruction, 5, 4)
    said = spoken_tokens(embedder, TEXT, instruction=instruction, steps=5, top=4)
    assert [one.step for one in seen.steps] == list(range(6))
    assert [one.spoken for one in seen.steps] == [[], *said]
    assert seen.phases == new_tokens(said)
    refined = embedder.refine([TEXT], instruction=instruction, steps=5)
    assert [one.stability for one in seen.steps[:2]] == [None, None]
    np.testing.assert_allclose([one.stability for one in seen.steps[2:]], refined.stability[0], atol=1e-6)
    assert (seen.tokens, seen.truncated) == (refined.tokens[0], False)


@pytest.mark.parametrize(
    "rule",
    [ConvergeStop(0.5, max_steps=9), ConvergeStop(0.9, max_steps=9), ConvergeStop(0.9, patience=1, min_steps=4, max_steps=9)],
    ids=repr,
)
def test_the_step_at_which_the_rule_would_stop_is_where_it_does_stop(rule: ConvergeStop, embedder_of: Loaded) -> None:
    embedder = embedder_of("bert", ruled(rule))
    seen = explore(embedder, TEXT, None, 9, 1)
    assert (seen.halt, seen.threshold) == (repr(rule), rule.threshold)
    assert seen.halted == embedder.refine([TEXT]).steps[0]


def test_a_rule_that_has_not_stopped_by_the_last_step_stops_nowhere(embedder_of: Loaded) -> None:
    assert explore(embedder_of("bert", ruled(ConvergeStop(2.0, max_steps=6))), TEXT, None, 5, 1).halted is None
    counted = explore(embedder_of("bert", ruled(FixedSteps(2))), TEXT, None, 3, 1)
    assert (counted.halted, counted.threshold) == (2, None)


def test_the_nearest_passages_of_a_step_are_those_of_its_vector(bert: Embedder, index: Index) -> None:
    seen = explore(bert, TEXT, None, 3, 1, index, 2)
    for k, one in enumerate(seen.steps):
        expected = index.search(bert.encode(TEXT, steps=k), k=2)
        assert one.hits is not None
        assert [hit.reference for hit in one.hits] == [hit.reference for hit in expected]
        assert [hit.score for hit in one.hits] == pytest.approx([hit.score for hit in expected], abs=1e-5)


def test_nothing_is_looked_for_before_there_is_an_embedding(qwen: Embedder, tmp_path: Path) -> None:
    made = Index.build(tmp_path / "texts", qwen, PASSAGES, halt=FixedSteps(1))
    seen = explore(qwen, TEXT, None, 1, 1, made, 1)
    assert seen.steps[0].hits is None
    assert len(seen.steps[1].hits or []) == 1


@pytest.mark.parametrize(("family", "spoken"), [("qwen2", None), ("bert", doubles.VOCAB)])
def test_a_step_costs_what_the_configuration_says(family: str, spoken: int | None, embedder_of: Loaded) -> None:
    embedder = embedder_of(family)
    seen = explore(embedder, TEXT, None, 4, 1)
    shape = Shape.of(embedder.source.base, causal=family == "qwen2", spoken=spoken)
    assert [one.operations for one in seen.steps] == [Cost(shape=shape, tokens=seen.tokens, steps=k).cached for k in range(5)]


def test_a_cost_that_no_configuration_tells_is_left_out(bert: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Shape:
        raise ConfigurationError("a mixture of experts")

    monkeypatch.setattr(Shape, "of", refuse)
    assert [one.operations for one in explore(bert, TEXT, None, 1, 1).steps] == [None, None]


def test_a_text_that_was_cut_is_flagged(bert: Embedder) -> None:
    seen = explore(bert, TEXT * 50, None, 1, 1)
    assert (seen.tokens, seen.truncated) == (doubles.PREFIX.max_length, True)


def test_a_one_pass_model_can_be_asked_for_no_step(embedder_of: Loaded) -> None:
    one_pass = embedder_of("qwen2", "bidirectional-avg")
    seen = explore(one_pass, TEXT, None, 0, 1)
    assert ([one.spoken for one in seen.steps], seen.halted, seen.phases) == ([[]], 0, [])
    with pytest.raises(ConfigurationError, match="bidirectional"):
        explore(one_pass, TEXT, None, 1, 1)


@pytest.mark.parametrize(("steps", "top", "hits"), [(1, 0, 1), (1, 1, 0), (-1, 1, 1), (0, 1, 1)])
def test_numbers_without_a_meaning_are_refused(qwen: Embedder, steps: int, top: int, hits: int) -> None:
    with pytest.raises(ConfigurationError):
        explore(qwen, TEXT, None, steps, top, None, hits)


def test_a_text_without_tokens_is_refused(folder_of: Callable[[str], Path]) -> None:
    bare = load(folder_of("qwen2"), preset=ModelSettings(special_tokens=((), ())), dtype="float64")
    with pytest.raises(InputError, match="has no tokens"):
        explore(bare, "", None, 1, 1)


def test_an_embedding_that_is_not_finite_is_an_error(bert: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = type(bert.settings.pooling).advance

    def broken(*arguments: Any) -> Any:
        progress, cosine = advance(*arguments)
        return replace(progress, embedding=progress.embedding * float("nan")), cosine

    monkeypatch.setattr(type(bert.settings.pooling), "advance", broken)
    with pytest.raises(NonFiniteError, match="after 1 steps"):
        explore(bert, TEXT, None, 2, 1)


@pytest.fixture
def service(bert: Embedder) -> Iterator[Service]:
    made = Service(bert, name="first", limits=Limits(batch_tokens=512, request_bytes=4096, steps=6))
    yield made
    made.close(grace=10.0)


def answers(app: Any, *requests: dict[str, Any]) -> list[httpx.Response]:
    """Send requests at the same time, and return the answers in order."""

    async def send() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await asyncio.gather(*(client.request(**request) for request in requests))

    return asyncio.run(send())


def post(**body: Any) -> dict[str, Any]:
    return {"method": "POST", "url": "/explore", "json": body}


def get(url: str, **more: Any) -> dict[str, Any]:
    return {"method": "GET", "url": url, **more}


def test_the_route_answers_with_what_the_function_gives(service: Service, bert: Embedder, index: Index) -> None:
    [answer] = answers(create_app(service, index=index), post(text=TEXT, instruction="Find.", steps=3, top=2, hits=2))
    assert answer.status_code == 200
    value, seen = answer.json(), explore(bert, TEXT, "Find.", 3, 2, index, 2)
    assert (value["model"], value["instruction"], value["halted"], value["threshold"]) == ("first", "Find.", seen.halted, 0.9)
    assert (value["tokens"], value["truncated"], value["phases"]) == (seen.tokens, False, [list(phase) for phase in seen.phases])
    for one, step in zip(value["steps"], seen.steps, strict=True):
        assert one["spoken"] == [{"token": word.token, "probability": pytest.approx(word.probability)} for word in step.spoken]
        assert one["stability"] == (None if step.stability is None else pytest.approx(step.stability))
        assert one["operations"] == step.operations
        shown = [{"score": pytest.approx(hit.score), "reference": hit.reference, "summary": hit.summary} for hit in step.hits or ()]
        assert one["hits"] == shown


def test_the_page_is_told_what_it_can_ask_for(service: Service, qwen: Embedder, index: Index) -> None:
    [answer] = answers(create_app(service, also={"second": qwen}, index=index), get("/explore"))
    value = answer.json()
    assert [(model["name"], model["steps"], model["dimensions"]) for model in value["models"]] == [("first", 6, 32), ("second", 6, 32)]
    assert (value["index"], value["max_steps"]) == ({"passages": 3, "model": "first"}, 6)


def test_an_index_is_searched_for_the_model_that_made_it_alone(service: Service, qwen: Embedder, index: Index) -> None:
    app = create_app(service, also={"second": qwen}, index=index)
    first, second = answers(app, post(text=TEXT, steps=1), post(text=TEXT, steps=1, model="second"))
    assert len(first.json()["steps"][1]["hits"]) == 3
    assert second.json()["steps"][1]["hits"] is None
    assert second.json()["halt"] == repr(qwen.settings.halt)


def test_an_index_may_be_that_of_a_further_model(bert: Embedder, qwen: Embedder, index: Index) -> None:
    assert Explorer({"first": qwen, "second": bert}, index, max_steps=6).choices()["index"] == {"passages": 3, "model": "second"}


def test_an_index_that_no_model_made_is_refused(qwen: Embedder, index: Index) -> None:
    with pytest.raises(ConfigurationError, match="made by the model"):
        Explorer({"first": qwen}, index, max_steps=6)


@pytest.mark.parametrize(("field", "least", "most"), [("steps", 0, 6), ("top", 1, 20), ("hits", 1, 20)])
def test_what_can_be_asked_for_ends_where_it_says(field: str, least: int, most: int, service: Service) -> None:
    wished = [post(**({"text": TEXT, "steps": 1} | {field: value})) for value in (least, most, least - 1, most + 1)]
    assert [answer.status_code for answer in answers(create_app(service), *wished)] == [200, 200, 400, 400]


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (post(text=TEXT, model="other"), 404, "'other' is not served here, but 'first'"),
        (post(text=TEXT, steps=7), 400, "at most 6"),
        (post(text=TEXT, steps=-1), 400, "steps"),
        (post(text=TEXT, steps="3"), 400, "steps"),
        (post(text=TEXT, top=0), 400, "top"),
        (post(text=TEXT, hits=21), 400, "hits"),
        (post(text=TEXT, wieght=1), 400, "wieght"),
        (post(steps=1), 400, "text"),
        (post(text=["a"]), 400, "text"),
        (post(text=TEXT * 500), 413, "4096"),
        ({"method": "POST", "url": "/explore", "content": "text=a"}, 415, "JSON"),
    ],
)
def test_what_cannot_be_explored_is_refused_with_the_reason(request_: dict[str, Any], status: int, said: str, service: Service) -> None:
    [answer] = answers(create_app(service), request_)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_texts_are_explored_one_at_a_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most, threads = 0, 0, set()
    own = explore

    def counted(*arguments: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        threads.add(threading.current_thread().name)
        try:
            return own(*arguments)
        finally:
            under_way -= 1

    monkeypatch.setattr(module, "explore", counted)
    assert {answer.status_code for answer in answers(create_app(service), *[post(text=TEXT, steps=2)] * 4)} == {200}
    assert most == 1
    assert [name.startswith("genembed-explorer") for name in threads] == [True]


def test_the_explorer_does_not_share_a_tokenizer_with_the_service(service: Service) -> None:
    own = Explorer({"first": service.embedder}, None, max_steps=6).models["first"]
    assert own.tokenizer.tokenizer is not service.embedder.tokenizer.tokenizer
    assert own.backbone is service.embedder.backbone


@pytest.mark.parametrize("path", PAGE_FILES)
def test_the_page_alone_needs_no_key(path: str, service: Service) -> None:
    app = create_app(service, api_key="secret")
    [answer] = answers(app, get(path))
    assert (answer.status_code, answer.content) == (200, PAGE_FILES[path][0].read_bytes())
    assert answer.headers["content-type"].startswith(PAGE_FILES[path][1])
    assert answer.headers["content-security-policy"].split(";")[0] == "default-src 'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "request_",
    [
        get("/explore"),
        post(text=TEXT),
        get("/info"),
        get("/metrics"),
        get("/static/"),
        get("/static/other.js"),
        get("/static/%2e%2e/explore.py"),
        {"method": "POST", "url": "/"},
        {"method": "POST", "url": "/static/script.js"},
    ],
    ids=lambda request: f"{request['method']} {request['url']}",
)
def test_all_else_needs_the_key(request_: dict[str, Any], service: Service) -> None:
    app = create_app(service, api_key="secret")
    without, wrong, right = answers(app, *(request_ | {"headers": headers} for headers in HEADERS))
    assert (without.status_code, wrong.status_code) == (401, 401)
    assert right.status_code != 401


HEADERS: list[dict[str, str]] = [{}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer secret"}]


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_markup() -> None:
    for file, _kind in PAGE_FILES.values():
        content = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        for word in (
            "http:",
            "https:",
            "//cdn",
            "@import",
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "style=",
        ):
            assert word not in content, f"{file.name}: {word}"


def test_a_model_that_is_served_twice_is_refused(folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(folder_of("bert"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", folder, "--also", folder])
    assert stopped.value.code == 2
    assert "is served already" in capsys.readouterr().err


def test_the_steps_of_a_request_are_as_many_as_the_server_allows_unless_it_says_so(service: Service) -> None:
    [answer] = answers(create_app(service), post(text=TEXT))
    assert len(answer.json()["steps"]) == 1 + min(20, service.live.max_steps)


def test_explorations_do_not_pile_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITING", 2)
    statuses = [answer.status_code for answer in answers(create_app(service), *[post(text=TEXT)] * 6)]
    assert (statuses.count(200), statuses.count(429)) == (2, 4)
