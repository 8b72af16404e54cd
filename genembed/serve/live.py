"""The engine as a service: one thread that never stops refining, and a queue in front of it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from genembed.decode import DecodeBatch, Job, Refined
from genembed.embedder import Embedder
from genembed.errors import GenembedError, NonFiniteError
from genembed.serve.terms import Terms, TermsOfRows
from genembed.tokens import TokenIds

IDLE_SECONDS = 0.5
"""Between two signs of life of an engine without work."""
_RATE_SECONDS = 10.0
"""Over which the rate behind `retry_after` is measured."""


class OverloadedError(GenembedError):
    """The queue is full; come back in `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(GenembedError):
    """The server is draining, or has stopped."""


@dataclass(frozen=True)
class Answer:
    """One embedded text."""

    vector: Float[np.ndarray, "hidden"]
    """Unit vector, float32."""
    steps: int
    """Refinement steps done."""
    complete: bool
    """Whether the halting rule ended it, and not the deadline."""


@dataclass(eq=False)
class Ticket:
    """A text on its way."""

    prompt: TokenIds
    terms: Terms
    answer: Future[Answer] = field(default_factory=Future)
    alone: bool = False
    """Whether it was in a batch that failed, and is tried by itself now."""
    left: bool = False
    """Whether nobody waits for it any more."""


class LiveEngine:
    """Refines texts of many callers in one decode batch. A newcomer joins at the next step, a halted text is answered at once.

    Args:
        embedder: The model; nobody else may use its engine meanwhile.
        max_rows: Texts under way at a time.
        max_queue_tokens: Prompt tokens that may wait, beside those under way.
        max_steps: The most steps a text may ask for.
    """

    def __init__(self, embedder: Embedder, *, max_rows: int = 64, max_queue_tokens: int = 65_536, max_steps: int = 20) -> None:
        self.backbone = embedder.backbone
        self.max_rows = max_rows if embedder.backbone.packable else 1
        self.max_queue_tokens = max_queue_tokens
        self.max_steps = max_steps
        self.queued_tokens = 0
        self.answered = self.steps_done = 0
        self.last_sign = time.monotonic()
        self._capacity = embedder.settings.max_length + max_steps
        self._kept = embedder.engine.kept
        self._budget = embedder.engine.budget
        first_step = int(embedder.settings.pooling.needs_steps)
        self._terms = TermsOfRows(self.max_rows, max_steps=max_steps, first_step=first_step, device=self.backbone.device)
        self._queue: deque[Ticket] = deque()
        self._leaving: deque[Ticket] = deque()
        self._rows: dict[int, Ticket] = {}
        self._prompts: dict[int, TokenIds] = {}
        self._entering: list[int] = []
        self._finished: deque[tuple[float, int]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._batch = self._new_batch()
        self._thread = threading.Thread(target=self._run, name="genembed-engine", daemon=True)
        self._thread.start()

    def submit(self, prompts: Sequence[TokenIds], terms: Sequence[Terms]) -> list[Ticket]:
        """Queue the texts of a request, all of them or none.

        Raises:
            OverloadedError: If they would not fit into the queue now.
            ClosedError: If the engine is closing.
        """
        tickets = [Ticket(prompt, own) for prompt, own in zip(prompts, terms, strict=True)]
        tokens = sum(len(prompt) for prompt in prompts)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise ClosedError("the server is shutting down and takes no new texts.")
            if self.queued_tokens and self.queued_tokens + tokens > self.max_queue_tokens:
                raise OverloadedError(
                    f"{self.queued_tokens} tokens are waiting, and {tokens} more do not fit into a queue of {self.max_queue_tokens}.",
                    retry_after=self._retry_after(),
                )
            self.queued_tokens += tokens
            self._queue.extend(tickets)
            self._changed.notify()
        return tickets

    def leave(self, tickets: Sequence[Ticket]) -> None:
        """Give texts up: those that wait are never read, those under way leave after the next step."""
        with self._changed:
            self._leaving.extend(tickets)
            self._changed.notify()

    def close(self, *, grace: float) -> bool:
        """Take nothing new, finish what was accepted, and tell whether all of it was finished within `grace` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(grace)
        done = not self._thread.is_alive()
        with self._changed:
            unanswered = [*self._queue, *self._rows.values()]
        for ticket in unanswered:
            _fail(ticket, ClosedError("the server was stopped before this text was embedded."))
        return done and not unanswered

    @property
    def under_way(self) -> int:
        """Texts in the decode batch."""
        return len(self._rows)

    def _retry_after(self) -> int:
        """Return the whole seconds after which half of the queue should be done, at the present rate."""
        now = time.monotonic()
        recent = [(when, tokens) for when, tokens in list(self._finished) if when > now - _RATE_SECONDS]  # a copy: the engine goes on
        if not recent:
            return 1
        rate = sum(tokens for _, tokens in recent) / max(now - recent[0][0], 0.1)
        return max(1, min(60, math.ceil(self.queued_tokens / 2 / rate)))

    def _new_batch(self) -> DecodeBatch:
        job = Job(self._prompts, self._terms, eager=True)
        return DecodeBatch(self.backbone, self._budget, job, max_rows=self.max_rows, capacity=self._capacity, kept=self._kept)

    def _run(self) -> None:
        while self._wait():
            self._admit()
            if not self._rows:
                continue  # all that waited had left
            try:
                refined = self._batch.turn(self._entering)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong with one text must not end the service for the others
                self._recover(error)
            else:
                self._answer(refined)
            self.last_sign = time.monotonic()

    def _wait(self) -> bool:
        """Wait for work, and return False when there is none and will be none."""
        with self._changed:
            while not (self._queue or self._rows):
                if self._closing:
                    return False
                self._changed.wait(IDLE_SECONDS)
                self.last_sign = time.monotonic()
        return True

    def _admit(self) -> None:
        """Give waiting texts the free places, and let those go that nobody waits for."""
        with self._changed:
            if self._leaving:
                self._let_go()
            free = [place for place in range(self.max_rows) if place not in self._rows]
            while self._queue and free and self._may_enter(self._queue[0]):
                ticket = self._queue.popleft()
                self.queued_tokens -= len(ticket.prompt)
                self._enter(free.pop(0), ticket)

    def _let_go(self) -> None:
        while self._leaving:
            self._leaving.popleft().left = True
        for place, ticket in self._rows.items():
            if ticket.left:
                self._terms.release(place)
        for ticket in [ticket for ticket in self._queue if ticket.left]:
            self._queue.remove(ticket)
            self.queued_tokens -= len(ticket.prompt)
            ticket.answer.cancel()

    def _may_enter(self, ticket: Ticket) -> bool:
        """A text that is tried alone waits until the batch is empty, and others wait until it is done."""
        return not self._rows if ticket.alone else not any(other.alone for other in self._rows.values())

    def _enter(self, place: int, ticket: Ticket) -> None:
        self._terms.promise(place, ticket.terms)
        self._rows[place], self._prompts[place] = ticket, ticket.prompt
        self._entering.insert(0, place)

    def _answer(self, refined: Refined | None) -> None:
        if refined is None:
            return
        for row, (place, sound) in enumerate(zip(refined.index.tolist(), refined.sound, strict=True)):
            ticket = self._rows.pop(place)
            del self._prompts[place]
            steps = int(refined.steps[row])
            self._finished.append((time.monotonic(), len(ticket.prompt)))
            self.answered, self.steps_done = self.answered + 1, self.steps_done + steps
            if ticket.left:
                ticket.answer.cancel()
            elif sound:
                complete = ticket.terms.halted(steps, torch.from_numpy(refined.stability[row]))
                with suppress(InvalidStateError):  # a server that was stopped has answered for it
                    ticket.answer.set_result(Answer(refined.vectors[row], steps, complete))
            else:
                _fail(ticket, NonFiniteError(f"the embedding is not finite or is zero after {steps} steps; check the model's weights."))
        while self._finished and self._finished[0][0] < time.monotonic() - _RATE_SECONDS:
            self._finished.popleft()

    def _recover(self, error: Exception) -> None:
        """After an error begin a new batch: a text that was by itself is at fault, several are tried again one by one."""
        tickets = list(self._rows.values())
        self._rows.clear()
        self._prompts.clear()
        self._entering.clear()
        self._batch = self._new_batch()
        if len(tickets) == 1:
            _fail(tickets[0], error)
            return
        with self._changed:
            for ticket in tickets:
                ticket.alone = True
                self.queued_tokens += len(ticket.prompt)
            self._queue.extendleft(reversed(tickets))


def _fail(ticket: Ticket, error: Exception) -> None:
    with suppress(InvalidStateError):
        ticket.answer.set_exception(error)
