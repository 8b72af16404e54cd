"""The HTTP side: routes, the key, limits, and one shape for every error."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

import genembed
from genembed.embedder import Embedder
from genembed.serve import protocols
from genembed.serve.explore import PAGE_FILES, PAGE_HEADERS, Explorer, ExploreRequest
from genembed.serve.failures import Failure, failure_of, json_response
from genembed.serve.metrics import CONTENT_TYPE, Metrics
from genembed.serve.service import Service

if TYPE_CHECKING:
    from genembed.index import Index

log = logging.getLogger("genembed.serve")

CLIENT_GONE = 499
"""Status of a request whose client left before it was answered; nobody reads it but the metrics."""
_TEI = ("/embed", "/info")


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    grace: float = 30.0,
    also: Mapping[str, Embedder] | None = None,
    index: Index | None = None,
) -> FastAPI:
    """Return the server's application.

    Args:
        service: The model.
        api_key: What clients must send as `Authorization: Bearer`, on every route but the page's files; None asks for nothing.
        grace: Seconds in which accepted texts may be finished when the server stops.
        also: Further models, by name, that the page can compare with the service's own.
        index: Documents that the page looks at, made by one of the models.

    Raises:
        ConfigurationError: If none of the models made the index.
    """
    explorer = Explorer({service.name: service.embedder, **(also or {})}, index, max_steps=service.live.max_steps)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        explorer.close()
        await asyncio.to_thread(service.close, grace=grace)

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="genembed", version=genembed.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service, app.state.metrics = service, Metrics(service.live)
    direct = _embedding_routes(app, service)
    _state_routes(app, service)
    _page_routes(app, service, explorer)
    app.add_exception_handler(HTTPException, _http_exception)
    paths = {getattr(route, "path", "") for route in app.router.routes}
    app.add_middleware(Guard, paths=paths, direct=direct, metrics=app.state.metrics, service=service, api_key=api_key)
    return app


class Guard:
    """Around every route: the key, the number of open requests, the count of answers, and errors in the client's shape.

    Args:
        app: What it guards.
        paths: Of all routes, to name a request's route in the metrics; none has a variable part.
        direct: What answers POST on some paths, past `app`: its routing costs a request more than all that we do for it (docs/LOG.md).
        metrics: Where answers are counted.
        service: For its limits.
        api_key: The key, if one is asked for.
    """

    def __init__(
        self, app: ASGIApp, *, paths: set[str], direct: Mapping[str, ASGIApp], metrics: Metrics, service: Service, api_key: str | None
    ) -> None:
        self.app = app
        self.paths = paths
        self.direct = direct
        self.metrics = metrics
        self.service = service
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, path = time.perf_counter(), 500, scope["path"]
        route = path if path in self.paths else "other"  # one label for all else that is asked for, so that nobody can make thousands
        answering = self.direct.get(path, self.app) if scope["method"] == "POST" else self.app

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.open += 1
        try:
            self._check(scope)
            await answering(scope, receive, counted)
        except Exception as error:  # noqa: BLE001 - every request is answered, in the shape its client reads
            await answer_of(error, path)(scope, receive, counted)
        finally:
            self.open -= 1
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begin)

    def _check(self, scope: Scope) -> None:
        if self.expected is not None and not _is_page(scope):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                raise Failure(401, "the key is missing or wrong: send it as Authorization: Bearer KEY.", code="invalid_api_key")
        most = self.service.limits.concurrent_requests
        if self.open > most and scope["method"] != "GET":  # whoever watches the server must see it when it is busy, too
            raise Failure(429, f"{most} requests are open already.", code="rate_limit_exceeded", retry_after=1)


def _is_page(scope: Scope) -> bool:
    """Tell whether a request is for the page itself, the one thing that needs no key: a browser cannot send one before it has the page.

    The files are the same on every server; what the page then asks for needs the key as ever.
    """
    return scope["method"] == "GET" and scope["path"] in PAGE_FILES


async def _http_exception(request: Request, error: Exception) -> Response:
    return answer_of(error, request.url.path)


def answer_of(error: Exception, path: str) -> Response:
    """Return the answer to a request that failed."""
    if isinstance(error, HTTPException):
        error = Failure(error.status_code, f"{path}: {error.detail}.")
    failure = failure_of(error)
    if failure.status >= 500 and failure.code == "internal_error":
        log.error("%s failed", path, exc_info=error.__cause__ or error)
    body = failure.tei() if path in _TEI else failure.openai()
    return json_response(body, failure.status, headers=failure.headers)


async def body_of(request: Request, service: Service) -> Any:
    """Read and parse a request's body, within its limits.

    Raises:
        Failure: If it is no JSON, too long, too slow, or compressed.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Failure(415, "the body must be JSON, with Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Failure(415, "the body must not be compressed.")
    limit, chunks, length = service.limits.request_bytes, list[bytes](), 0
    too_long = Failure(413, f"the request is longer than {limit} bytes; send several.", code="request_too_large")
    if (request.headers.get("content-length") or "0").isdecimal() and int(request.headers.get("content-length") or "0") > limit:
        raise too_long
    try:
        async with asyncio.timeout(service.limits.body_seconds):
            async for chunk in request.stream():
                length += len(chunk)
                if length > limit:
                    raise too_long
                chunks.append(chunk)
    except ClientDisconnect:
        raise Failure(CLIENT_GONE, "the client left.") from None
    except TimeoutError:
        raise Failure(408, f"the request did not arrive within {service.limits.body_seconds:g} seconds.") from None
    try:
        return orjson.loads(b"".join(chunks))
    except orjson.JSONDecodeError as error:
        raise Failure(400, f"the body is not JSON: {error}.", code="invalid_json") from None


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Await some work, and give it up when the client leaves.

    Raises:
        Failure: With status 499, if the client left.
    """
    worker, watch = asyncio.current_task(), asyncio.ensure_future(_disconnected(request))
    assert worker is not None
    done = left = False

    def leave(_: object) -> None:
        nonlocal left
        if not done:
            left = worker.cancel()

    watch.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not left:
            raise
        worker.uncancel()
        raise Failure(CLIENT_GONE, "the client left.") from None
    finally:
        done = True
        watch.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _embedding_routes(app: FastAPI, service: Service) -> dict[str, ASGIApp]:
    """Add the routes that embed, and return what answers them; each reads its own body, as no framework bounds its length and depth."""
    direct: dict[str, ASGIApp] = {}
    for path, model in (
        ("/v1/embeddings", protocols.OpenAIRequest),
        ("/v2/embed", protocols.CohereRequest),
        ("/embed", protocols.TeiRequest),
    ):
        endpoint = _embeds(model, service)
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None, openapi_extra=_documented(model))
        direct[path] = _application(endpoint)
    return direct


def _embeds(model: type[Any], service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def embed(request: Request) -> Response:
        wanted = model.model_validate(await body_of(request, service))
        done = await unless_gone(request, wanted.answer(service))
        return done if isinstance(done, Response) else json_response(done)

    embed.__doc__ = model.__doc__
    return embed


def _application(endpoint: Callable[[Request], Awaitable[Response]]) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)

    return answer


def _documented(model: type[Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _state_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> Response:
        """List the model that is served, as OpenAI does."""
        own = {"id": service.name, "object": "model", "created": started, "owned_by": "genembed"}
        return json_response({"object": "list", "data": [own]})

    @app.get("/info")
    async def info() -> Response:
        """Say what is served and how much of it."""
        return json_response(service.info())

    @app.get("/health")
    async def health() -> Response:
        """Say that the process lives."""
        return json_response({"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether a text would be embedded now."""
        if not await service.ready():
            raise Failure(503, "the engine does not answer, or is shutting down.", code="not_ready", retry_after=1)
        return json_response({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the counters in Prometheus' format."""
        return Response(app.state.metrics.text(), media_type=CONTENT_TYPE)


def _page_routes(app: FastAPI, service: Service, explorer: Explorer) -> None:
    """Add the page, and what it asks for."""
    for path, (file, kind) in PAGE_FILES.items():
        app.add_api_route(path, _sends(file, kind), methods=["GET"], response_model=None, include_in_schema=False)

    @app.get("/explore")
    async def choices() -> Response:
        """Say which models can be explored, and whether there is an index."""
        return json_response(explorer.choices())

    @app.post("/explore", response_model=None, openapi_extra=_documented(ExploreRequest))
    async def explore(request: Request) -> Response:
        """Refine one text, and say what can be seen of it after each step."""
        wanted = ExploreRequest.model_validate(await body_of(request, service))
        return json_response(await unless_gone(request, explorer.answer(wanted)))


def _sends(file: Path, kind: str) -> Callable[[], Awaitable[Response]]:
    content = file.read_bytes()

    async def send() -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return send
