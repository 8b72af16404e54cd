"""What a client is told, above all when it gets no embedding: a status, a kind, a sentence."""

from __future__ import annotations

import reprlib
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Response
from pydantic import ValidationError

from genembed.errors import ConfigurationError, InputError, NonFiniteError
from genembed.serve.live import ClosedError, DeadlineError, OverloadedError


class Failure(Exception):  # noqa: N818 - most of them are the client's
    """A request that is refused, or that failed."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """The error's type, as OpenAI names them."""
        named = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return named.get(self.status, "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
            found["Connection"] = "close"  # what is still to come is not read
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == HTTPStatus.UNAUTHORIZED else {})

    def openai(self) -> dict[str, Any]:
        """Return the body in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def tei(self) -> dict[str, Any]:
        """Return the body in the shape of text-embeddings-inference."""
        kinds = {429: "overloaded", 503: "unhealthy", 413: "validation", 400: "validation", 422: "validation"}
        return {"error": self.message, "error_type": kinds.get(self.status, "backend" if self.status >= 500 else "validation")}


def failure_of(error: Exception) -> Failure:
    """Return what a client is told of an error; of one that nobody expected, nothing but that it happened."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, OverloadedError):
        return Failure(429, str(error), code="rate_limit_exceeded", retry_after=error.retry_after)
    if isinstance(error, ClosedError):
        return Failure(503, str(error), code="shutting_down", retry_after=1)
    if isinstance(error, DeadlineError):
        # The server is as it should be, and busier than this text's time allows: the same as a queue that is full.
        return Failure(429, str(error), code="deadline_exceeded", retry_after=1)
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, (InputError, ConfigurationError, TypeError)):
        return Failure(400, str(error), code="invalid_input")
    if isinstance(error, NonFiniteError):
        return Failure(500, str(error), code="not_finite")
    if isinstance(error, MemoryError):
        return Failure(500, "this text does not fit into memory, not even alone.", code="out_of_memory")
    return Failure(500, "the text could not be embedded; the server's log says why.", code="internal_error")


def _invalid(error: ValidationError) -> Failure:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"][:1])
    value = f"{reprlib.repr(first['input']):.80}"  # the input may be nested as deeply as a parser allows
    reason = first["msg"].removeprefix("Value error, ")
    return Failure(400, f"{where or 'the request'}: {reason}; got {value}.", code="invalid_value", param=where or None)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON; NumPy arrays become lists of numbers."""
    content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, media_type="application/json", headers=headers)
