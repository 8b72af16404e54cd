"""From the texts of a request to their vectors, whatever protocol it came by."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

import genembed
from genembed.embedder import Embedder
from genembed.errors import ConfigurationError, InputError
from genembed.halting import ConvergeStop, FixedSteps, rule_from_json
from genembed.serve.failures import Failure, failure_of
from genembed.serve.limits import Limits
from genembed.serve.live import ClosedError, LiveEngine, OverloadedError
from genembed.serve.queueing import Ticket, answers_of
from genembed.serve.terms import Terms
from genembed.tokens import Tokenised

QUERY = ("search_query", "query", "retrieval.query")
DOCUMENT = ("search_document", "document", "passage", "retrieval.passage")
BARE = ("classification", "clustering", "separation", "text-matching")
"""What clients call the purpose of a text: those that mean a query, a document, or neither."""

SILENT_SECONDS = 5.0
"""After which an engine that has given no sign of life counts as frozen."""
_PROBE = "ready?"

SHORT_CHARACTERS, SHORT_TEXTS = 2_000, 32
"""What of a request is tokenised at once, in about a millisecond; more would hold up other connections."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How a client wants its texts embedded."""

    instruction: str | None = None
    purpose: str | None = None
    """Instead of an instruction: one of `QUERY`, `DOCUMENT`, `BARE`."""
    steps: int | None = None
    halt: Mapping[str, Any] | None = None
    """A halting rule, as in a settings file."""
    deadline_ms: float | None = None
    """Milliseconds after which the best vector there is will do."""
    truncate: Literal["right", "error"] = "error"


@dataclass(frozen=True)
class Embedded:
    """The texts of a request, embedded."""

    vectors: Float[np.ndarray, "texts hidden"]
    steps: list[int]
    truncated: list[bool]
    complete: list[bool]
    """Whether the halting rule ended the text, and not the deadline."""
    tokens: int
    """Prompt tokens read."""

    def metadata(self) -> dict[str, Any]:
        """Return what a response says of each text beside its vector."""
        return {"steps": self.steps, "truncated": self.truncated, "complete": self.complete}


class Service:
    """A model that embeds the texts of many requests at a time.

    Args:
        embedder: The model.
        name: The name it is served under.
        limits: What is accepted.

    Raises:
        ConfigurationError: If the limits exclude the model's own halting rule, or one text.
    """

    def __init__(self, embedder: Embedder, *, name: str, limits: Limits) -> None:
        settings = embedder.settings
        if settings.halt.max_steps > limits.steps:
            raise ConfigurationError(f"steps={limits.steps}: the model's own rule is {settings.halt}; allow as many steps.")
        self.embedder = embedder
        self.name = name
        self.limits = limits
        self.live = LiveEngine(
            embedder,
            max_rows=limits.rows(settings.max_length),
            max_queue_tokens=limits.queue_tokens,
            max_steps=limits.steps,
        )
        # A thread of its own: tokenising a long text must not hold up other connections, and tokenizers are not for several threads.
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="genembed-tokenizer")
        self._tokenizer_is_used = threading.Lock()
        tokenizer = embedder.tokenizer
        self._fewest_tokens = max(1, len(tokenizer.before) + len(tokenizer.after))
        self.dimensions = embedder.get_embedding_dimension()  # kept, as a configuration of Transformers is slow to ask
        self._closed = False

    async def embed(self, texts: Sequence[str], wish: Wish) -> Embedded:
        """Embed the texts of one request; cancelled, it gives them up.

        Raises:
            Failure: If the request cannot be served.
        """
        self._check(texts)
        try:
            terms, instruction = self._terms(wish), self._instruction(wish)
            if self._closed:
                raise ClosedError("the server is shutting down and takes no new texts.")
            self.live.check_room(len(texts) * self._fewest_tokens)
            tokenised = await self._tokens(texts, instruction, wish)
            tickets = self.live.submit(tokenised.ids, [terms] * len(texts))
        except Exception as error:
            raise failure_of(error) from error
        try:
            answers = await answers_of(tickets)
        except asyncio.CancelledError:
            self.live.leave(tickets)
            raise
        except Exception as error:
            self.live.leave(tickets)
            raise _named(failure_of(error), tickets, error) from error
        return Embedded(
            np.stack([answer.vector for answer in answers]),
            [answer.steps for answer in answers],
            tokenised.truncated.tolist(),
            [answer.complete for answer in answers],
            int(tokenised.tokens.sum()),
        )

    async def ready(self) -> bool:
        """Tell whether a text would be embedded now, by having one embedded."""
        if time.monotonic() - self.live.last_sign > SILENT_SECONDS:
            return False
        probe = Wish(steps=int(self.embedder.settings.pooling.needs_steps))
        try:
            async with asyncio.timeout(SILENT_SECONDS):
                await self.embed([_PROBE], probe)
        except TimeoutError:
            return time.monotonic() - self.live.last_sign <= SILENT_SECONDS  # others are served meanwhile
        except Failure as failure:
            return isinstance(failure.__cause__, OverloadedError)  # busy is not broken
        return True

    def info(self) -> dict[str, Any]:
        """Say what is served and how much of it, with the names of text-embeddings-inference where it has one."""
        settings, limits = self.embedder.settings, self.limits
        return {
            "model_id": self.name,
            "model_dtype": str(self.embedder.backbone.dtype).removeprefix("torch."),
            "model_type": {"embedding": {"pooling": settings.pooling.kind}},
            "dimensions": self.dimensions,
            "halt": repr(settings.halt),
            "max_input_length": settings.max_length,
            "max_batch_tokens": limits.batch_tokens,
            "max_client_batch_size": limits.client_batch,
            "max_concurrent_requests": limits.concurrent_requests,
            "max_steps": self.live.max_steps,
            "version": genembed.__version__,
        }

    def close(self, *, grace: float) -> bool:
        """Finish what was accepted; tell whether all of it was. Closed once more, it gives up what is left."""
        grace, self._closed = 0.0 if self._closed else grace, True
        done = self.live.close(grace=grace)
        self._tokenising.shutdown(wait=False)  # texts that are read now are told that the server is shutting down
        return done

    def _check(self, texts: Sequence[str]) -> None:
        if not texts:
            raise Failure(400, "input is empty: give at least one text.", code="invalid_input", param="input")
        most = self.limits.client_batch
        if len(texts) > most:
            raise Failure(413, f"{len(texts)} texts in one request; at most {most} are taken: send several requests.", param="input")

    def _terms(self, wish: Wish) -> Terms:
        if wish.steps is not None and wish.halt is not None:
            raise ConfigurationError(f"steps={wish.steps} and halt={dict(wish.halt)} both say when to stop; give one of them.")
        rule: FixedSteps | ConvergeStop = self.embedder.settings.halt
        if wish.steps is not None:
            rule = FixedSteps(wish.steps)
        elif wish.halt is not None:
            rule = rule_from_json(wish.halt)
        if rule.max_steps > self.live.max_steps:
            raise ConfigurationError(f"{rule} asks for {rule.max_steps} steps; this server does at most {self.live.max_steps}.")
        self.embedder.backbone.check_halt(rule)
        if wish.deadline_ms is None:
            return Terms(rule=rule)
        if not wish.deadline_ms > 0:
            raise ConfigurationError(f"deadline_ms={wish.deadline_ms}: must be positive.")
        return Terms(rule=rule, deadline=time.monotonic() + wish.deadline_ms / 1_000)

    def _instruction(self, wish: Wish) -> str | None:
        if wish.purpose is None:
            return wish.instruction
        if wish.instruction is not None:
            raise ConfigurationError(
                f"instruction={wish.instruction!r:.80} and {wish.purpose!r} both say what the texts are for; give one."
            )
        settings = self.embedder.settings
        if wish.purpose in QUERY:
            return settings.query_instruction
        if wish.purpose in DOCUMENT:
            return settings.document_instruction
        if wish.purpose in BARE:
            return None
        raise ConfigurationError(
            f"{wish.purpose!r} is no purpose; known ones: {', '.join((*QUERY, *DOCUMENT, *BARE))}; or give an instruction."
        )

    async def _tokens(self, texts: Sequence[str], instruction: str | None, wish: Wish) -> Tokenised:
        """Tokenise a few short texts here, which takes less than waking a thread; others in the tokenizer's own."""
        short = len(texts) <= SHORT_TEXTS and sum(map(len, texts)) + len(instruction or "") <= SHORT_CHARACTERS
        if short and self._tokenizer_is_used.acquire(blocking=False):
            try:
                return self._tokenise(texts, instruction, wish)
            finally:
                self._tokenizer_is_used.release()
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, self._tokenise_alone, texts, instruction, wish)

    def _tokenise_alone(self, texts: Sequence[str], instruction: str | None, wish: Wish) -> Tokenised:
        with self._tokenizer_is_used:
            return self._tokenise(texts, instruction, wish)

    def _tokenise(self, texts: Sequence[str], instruction: str | None, wish: Wish) -> Tokenised:
        tokenised = self.embedder.tokenizer(texts, instruction)
        if wish.truncate == "error" and tokenised.truncated.any():
            row = int(tokenised.truncated.argmax())
            most = self.embedder.settings.max_length
            raise InputError(f"text {row} does not fit into the model's {most} tokens; shorten it, or allow truncate='right'.", row=row)
        return tokenised


def _named(failure: Failure, tickets: Sequence[Ticket], error: Exception) -> Failure:
    """Say which text of a request is at fault."""
    done = ((row, ticket.answer) for row, ticket in enumerate(tickets) if ticket.answer.done() and not ticket.answer.cancelled())
    row = next((row for row, answer in done if answer.exception() is error), None)
    if row is not None and len(tickets) > 1 and failure.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        failure.message = f"text {row}: {failure.message}"
    return failure
