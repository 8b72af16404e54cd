"""Texts that wait for a place, one of each request in turn."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from genembed.serve.terms import Terms
from genembed.tokens import TokenIds


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


class FairQueue:
    """Texts of several requests, taken one of each in turn: a short request is not held by a long one before it."""

    def __init__(self) -> None:
        self.tokens = 0
        """Prompt tokens that wait."""
        self._requests: deque[deque[Ticket]] = deque()
        self.waiting = 0
        """Texts that wait."""
        self._hurried = 0
        """Texts that wait and have a deadline."""

    def __bool__(self) -> bool:
        """Tell whether a text waits."""
        return bool(self._requests)

    def add(self, request: Sequence[Ticket]) -> None:
        """Let the texts of a request wait, behind those of the others."""
        self._requests.append(deque(request))
        for ticket in request:
            self._note(ticket)

    def put_first(self, tickets: Sequence[Ticket]) -> None:
        """Let texts wait before all others, in this order."""
        self._requests.extendleft(deque([ticket]) for ticket in reversed(tickets))
        for ticket in tickets:
            self._note(ticket)

    def first(self) -> Ticket:
        """Return the text whose turn it is."""
        return self._requests[0][0]

    def take(self) -> Ticket:
        """Take out the text whose turn it is; its request goes behind the others."""
        request = self._requests.popleft()
        ticket = request.popleft()
        if request:
            self._requests.append(request)
        self._forget(ticket)
        return ticket

    def drop(self, unwanted: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take out all texts of a kind."""
        dropped = [ticket for request in self._requests for ticket in request if unwanted(ticket)]
        if dropped:
            kept = (deque(ticket for ticket in request if not unwanted(ticket)) for request in self._requests)
            self._requests = deque(request for request in kept if request)
            for ticket in dropped:
                self._forget(ticket)
        return dropped

    def drop_late(self, now: float) -> list[Ticket]:
        """Take out the texts whose deadline has passed."""
        return self.drop(lambda ticket: ticket.terms.deadline <= now) if self._hurried else []

    def everything(self) -> list[Ticket]:
        """Return all texts that wait."""
        return [ticket for request in self._requests for ticket in request]

    def _note(self, ticket: Ticket) -> None:
        self.waiting += 1
        self.tokens += len(ticket.prompt)
        self._hurried += ticket.terms.has_deadline

    def _forget(self, ticket: Ticket) -> None:
        self.waiting -= 1
        self.tokens -= len(ticket.prompt)
        self._hurried -= ticket.terms.has_deadline


async def answers_of(tickets: Sequence[Ticket]) -> list[Answer]:
    """Wait for all texts of a request, or for the first that fails; the event loop is woken once for all of them.

    Raises:
        Exception: The error of the first text that failed.
    """
    loop = asyncio.get_running_loop()
    over: asyncio.Future[Ticket | None] = loop.create_future()
    counting, left = threading.Lock(), len(tickets)

    def note(ticket: Ticket) -> None:
        nonlocal left
        failed = ticket.answer.cancelled() or ticket.answer.exception() is not None
        with counting:
            left -= 1
            last = left == 0
        if failed or last:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, ticket if failed else None)

    def settle(failed: Ticket | None) -> None:
        if not over.done():
            over.set_result(failed)

    for ticket in tickets:
        ticket.answer.add_done_callback(lambda _, ticket=ticket: note(ticket))  # type: ignore[misc]
    failed = await over
    return [ticket.answer.result() for ticket in (tickets if failed is None else [failed])]
