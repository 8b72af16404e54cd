"""The requests that clients of OpenAI, Cohere and text-embeddings-inference send, and the answers they expect."""

from __future__ import annotations

import base64
import uuid
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Response
from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, WithJsonSchema

from genembed import precision
from genembed.errors import ConfigurationError
from genembed.precision import OutputForm, Precision, check_dimensions
from genembed.serve.failures import Failure, json_response
from genembed.serve.service import Embedded, Service, Wish

TOKEN_ARRAYS = (
    "input holds token ids, and they are those of another tokenizer: send texts. With LangChain: "
    "OpenAIEmbeddings(check_embedding_ctx_length=False)."
)


def _texts(given: Any) -> list[str]:
    """Return texts, up to the first thing that is none: millions of them would make millions of errors."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise ValueError("a text or a list of texts is needed")
    wrong = next((place for place, one in enumerate(given) if not isinstance(one, str)), None)
    if wrong is None:
        return given
    if isinstance(given[wrong], (int, list)) and not isinstance(given[wrong], bool):
        raise Failure(400, TOKEN_ARRAYS, code="invalid_input", param="input")
    raise ValueError(f"entry {wrong} is no text")


def _plain(given: Any) -> dict[str, Any]:
    """Return a rule's fields, if they are few and plain."""
    if isinstance(given, dict) and len(given) <= _FIELDS and all(isinstance(one, (str, int, float)) for one in given.values()):
        return given
    raise ValueError("a halting rule is an object of plain values, as {'rule': 'ConvergeStop', 'threshold': 0.998}")


_FIELDS = 8
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

Texts = Annotated[list[str], PlainValidator(_texts), WithJsonSchema(_TEXTS)]
Halt = Annotated[dict[str, Any], PlainValidator(_plain), WithJsonSchema({"type": "object", "maxProperties": _FIELDS})]
Kind = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
_PRECISION: dict[Kind, Precision] = {
    "float": "float32", "base64": "float32", "int8": "int8", "uint8": "uint8", "binary": "binary", "ubinary": "ubinary",
}  # fmt: skip
Kinds = Annotated[list[Kind], FailFast(), Field(min_length=1)]
Steps = Annotated[int, Field(ge=0, strict=True)]
Dimensions = Annotated[int, Field(strict=True)]
Milliseconds = Annotated[float, Field(strict=True)]  # or true would be a deadline of one


class Request(BaseModel):
    """What every protocol's request has in common."""

    model_config = ConfigDict(extra="ignore")  # clients send settings of servers they were written for


class OpenAIRequest(Request):
    """POST /v1/embeddings: OpenAI's fields, and what a generative model can be asked beside them."""

    input: Texts
    model: str
    dimensions: Dimensions | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    input_type: str | None = None
    task: str | None = None
    prompt_name: str | None = None
    instruction: str | None = None
    steps: Steps | None = None
    halt: Halt | None = None
    deadline_ms: Milliseconds | None = None
    truncate: Literal["right", "error"] = "error"

    async def answer(self, service: Service) -> dict[str, Any]:
        """Embed, and answer as OpenAI does, with `metadata` beside."""
        if self.model != service.name:
            raise Failure(
                404, f"The model {self.model!r} is not served here, but {service.name!r} is.", code="model_not_found", param="model"
            )
        form = form_of(service, self.dimensions, "dimensions")
        purposes = {name: value for name in ("input_type", "task", "prompt_name") if (value := getattr(self, name)) is not None}
        if len(purposes) > 1:
            raise Failure(400, f"{' and '.join(purposes)} all say what the texts are for; give one of them.", param=next(iter(purposes)))
        wish = Wish(
            instruction=self.instruction,
            purpose=next(iter(purposes.values()), None),
            steps=self.steps,
            halt=self.halt,
            deadline_ms=self.deadline_ms,
            truncate=self.truncate,
        )
        done = await service.embed(self.input, wish)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": row, "embedding": encoded(vector, self.encoding_format)}
                for row, vector in enumerate(form(done.vectors))
            ],
            "model": service.name,
            "usage": {"prompt_tokens": done.tokens, "total_tokens": done.tokens},
            "metadata": done.metadata(),
        }


class CohereRequest(Request):
    """POST /v2/embed."""

    model: str
    texts: Texts
    input_type: str
    embedding_types: Kinds = ["float"]
    output_dimension: Dimensions | None = None
    truncate: Literal["NONE", "START", "END"] = "END"
    max_tokens: Annotated[int, Field(strict=True)] | None = None
    steps: Steps | None = None
    halt: Halt | None = None
    deadline_ms: Milliseconds | None = None

    async def answer(self, service: Service) -> dict[str, Any]:
        """Embed, and answer as Cohere does, with `metadata` in `meta`."""
        if self.model != service.name:
            raise Failure(404, f"model {self.model!r} is not served here, but {service.name!r} is.", code="model_not_found", param="model")
        forms = {kind: form_of(service, self.output_dimension, "output_dimension", kind=kind) for kind in self.embedding_types}
        if self.truncate == "START":
            raise Failure(400, "truncate='START': texts are cut at their end alone: 'END', or 'NONE' to refuse them.", param="truncate")
        if self.max_tokens is not None:
            raise Failure(400, f"max_tokens={self.max_tokens}: the model's own limit holds here; leave it out.", param="max_tokens")
        truncate: Literal["right", "error"] = "right" if self.truncate == "END" else "error"
        wish = Wish(purpose=self.input_type, steps=self.steps, halt=self.halt, deadline_ms=self.deadline_ms, truncate=truncate)
        done = await service.embed(self.texts, wish)
        return {
            "id": str(uuid.uuid4()),
            "embeddings": {kind: [encoded(vector, kind) for vector in form(done.vectors)] for kind, form in forms.items()},
            "texts": self.texts,
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": done.tokens}, "metadata": done.metadata()},
            "response_type": "embeddings_by_type",
        }


class TeiRequest(Request):
    """POST /embed."""

    inputs: Texts
    truncate: bool = False
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"
    prompt_name: str | None = None
    normalize: bool = True
    dimensions: Dimensions | None = None

    async def answer(self, service: Service) -> Response:
        """Embed, and answer with the bare vectors, for which the client has no room beside; totals are in headers."""
        form = form_of(service, self.dimensions, "dimensions")
        if not self.normalize:
            raise Failure(422, "normalize=false: vectors are sums of states made unit length; there is no other length to give.")
        if self.truncate and self.truncation_direction.lower() == "left":
            raise Failure(422, "truncation_direction='Left': texts are cut at their end alone.")
        wish = Wish(purpose=self.prompt_name, truncate="right" if self.truncate else "error")
        done: Embedded = await service.embed(self.inputs, wish)
        headers = {"X-Steps": str(sum(done.steps)), "X-Truncated": str(sum(done.truncated)), "X-Tokens": str(done.tokens)}
        return json_response(form(done.vectors), headers=headers)


def form_of(service: Service, dimensions: Dimensions | None, name: str, *, kind: Kind = "float") -> OutputForm:
    """Return the form vectors are wanted in, before anything is embedded.

    Args:
        service: The model.
        dimensions: How many are wanted; all if None.
        name: Of the request's field for `dimensions`.
        kind: In which numbers.

    Raises:
        Failure: If the model cannot give it.
    """
    embedder, hidden = service.embedder, service.dimensions
    trained = embedder.settings.matryoshka_dims
    try:
        if dimensions is not None:
            check_dimensions(dimensions, hidden=hidden, trained=trained, name=name)
        return precision.form_of(_PRECISION[kind], dimensions, hidden=hidden, trained=trained, ranges=embedder.ranges)
    except ConfigurationError as error:
        raise Failure(400, str(error), param=name if kind in ("float", "base64") else "embedding_types") from None


def encoded(vector: np.ndarray, kind: str) -> Any:
    """Return a vector as JSON numbers (by orjson, from the array), or as base64 of little-endian float32."""
    return vector if kind != "base64" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
