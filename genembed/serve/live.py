"""The engine as a service: one thread that never stops refining, and a queue in front of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import replace

import torch

from genembed.decode import DecodeBatch, Job, Refined
from genembed.embedder import Embedder
from genembed.errors import GenembedError, InputError, NonFiniteError
from genembed.serve.queueing import Answer, FairQueue, Ticket
from genembed.serve.terms import Terms, TermsOfRows
from genembed.tokens import TokenIds

IDLE_SECONDS = 0.5
"""Between two signs of life of an engine without work."""
log = logging.getLogger("genembed.serve")

_HELD_STEPS, _FEW = 1, 4
"""Steps more that newcomers wait where as many times more texts are under way."""
_RATE_SECONDS = 10.0
"""Over which the rate behind `retry_after` is measured."""


class OverloadedError(GenembedError):
    """The queue is full; come back in `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(GenembedError):
    """The server is draining, or has stopped."""


class DeadlineError(GenembedError):
    """The deadline of a text passed while it waited for a place."""


class LiveEngine:
    """Refines texts of many callers in one decode batch. A newcomer joins at the next step, a halted text is answered at once.

    Args:
        embedder: The model; nobody else may use its engine meanwhile.
        max_rows: Texts under way at a time.
        max_queue_tokens: Prompt tokens that may wait, beside those under way.
        max_steps: The most steps a text may ask for.
    """

    def __init__(self, embedder: Embedder, *, max_rows: int = 64, max_queue_tokens: int = 262_144, max_steps: int = 20) -> None:
        self.backbone = embedder.backbone
        self.max_rows = max_rows if embedder.backbone.packable else 1
        self.max_queue_tokens = max_queue_tokens
        self.max_steps = max_steps
        self.answered = self.steps_done = 0
        self.last_sign = time.monotonic()
        self._capacity = embedder.settings.max_length + max_steps
        self._kept = embedder.engine.kept
        # Somebody waits for every text: who has halted, or whose client has left, is seen after every step, on any device.
        self._budget = replace(embedder.engine.budget, check_every=1)
        first_step = int(embedder.settings.pooling.needs_steps)
        self._terms = TermsOfRows(self.max_rows, max_steps=max_steps, first_step=first_step, device=self.backbone.device)
        self._queue = FairQueue()
        self._leaving: deque[Ticket] = deque()
        self._rows: dict[int, Ticket] = {}
        self._prompts: dict[int, TokenIds] = {}
        self._entering: list[int] = []
        self._steps_since_read = 0
        self._finished: deque[tuple[float, int]] = deque()
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._batch = self._new_batch()
        self._thread = threading.Thread(target=self._run, name="genembed-engine", daemon=True)
        self._thread.start()

    def submit(self, prompts: Sequence[TokenIds], terms: Sequence[Terms]) -> list[Ticket]:
        """Queue the texts of a request, all of them or none.

        Raises:
            InputError: If they would not even fit into an empty queue.
            OverloadedError: If they would not fit into the queue now.
            ClosedError: If the engine is closing, or has stopped.
        """
        tickets = [Ticket(prompt, own) for prompt, own in zip(prompts, terms, strict=True)]
        tokens = sum(len(prompt) for prompt in prompts)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise ClosedError("the server is shutting down and takes no new texts.")
            self.check_room(tokens)
            self._queue.add(tickets)
            self._changed.notify()
        return tickets

    def check_room(self, tokens: int) -> None:
        """Refuse a request of so many tokens; of so many at least, it would be refused all the same once they are counted.

        Raises:
            InputError: If they would not even fit into an empty queue.
            OverloadedError: If they would not fit into the queue now.
        """
        if tokens > self.max_queue_tokens:
            raise InputError(f"the {tokens} tokens of this request do not fit into a queue of {self.max_queue_tokens}; send several.")
        if self.queued_tokens + tokens > self.max_queue_tokens:
            raise OverloadedError(
                f"{self.queued_tokens} tokens are waiting, and {tokens} more do not fit into a queue of {self.max_queue_tokens}.",
                retry_after=self._retry_after(),
            )

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._queue.tokens

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
            self._stopped = True
        return not self._give_up(ClosedError("the server was stopped before this text was embedded.")) and done

    def _give_up(self, error: Exception) -> int:
        """Fail all texts that are unanswered, and return their number."""
        with self._changed:
            unanswered = [*self._queue.everything(), *self._rows.values()]
        for ticket in unanswered:
            _fail(ticket, error)
        return len(unanswered)

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
        try:
            while self._wait():
                self._turn()
        except BaseException as error:
            log.critical("the engine has stopped", exc_info=error)
            with self._changed:
                self._closing = True
            self._give_up(error if isinstance(error, Exception) else ClosedError("the engine has stopped."))

    def _turn(self) -> None:
        """Refine all texts under way by one step."""
        self._admit()
        if not self._rows:
            return  # all that waited had left
        entering = len(self._entering)
        try:
            refined = self._batch.turn(self._entering)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong with one text must not end the service for the others
            self._recover(error)
        else:
            self._steps_since_read = 0 if len(self._entering) < entering else self._steps_since_read + 1
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
        return not self._stopped

    def _admit(self) -> None:
        """Give waiting texts the free places, and let those go that nobody waits for."""
        new: list[int] = []
        with self._changed:
            if self._leaving:
                self._let_go()
            if not self._wait_for_more():
                free = [place for place in range(self.max_rows) if place not in self._rows]
                while self._queue and len(new) < len(free) and self._may_enter(self._queue.first()):
                    self._enter(free[len(new)], self._queue.take())
                    new.append(free[len(new)])
            late = self._queue.drop_late(time.monotonic())
        # The batch takes from the end: the longest first, as it reads prompts of one length together.
        self._entering[:0] = sorted(new, key=lambda place: len(self._prompts[place]))
        for ticket in late:
            _fail(ticket, DeadlineError("the deadline passed while the text waited for a place; no step of it was done."))

    def _wait_for_more(self) -> bool:
        """Tell whether newcomers wait for a step of those under way, so that more of them can be read in one pass.

        Reading a prompt alone costs as much as a step, and all rows under way stand still meanwhile; reading a few costs little more. So
        there is a step between two readings, and one more where those who wait are few beside those who would stand still.
        """
        if not (self._rows and self._queue):
            return False
        few = self._queue.waiting * _FEW < len(self._rows)
        return self._steps_since_read < (1 + _HELD_STEPS if few else 1)

    def _let_go(self) -> None:
        while self._leaving:
            self._leaving.popleft().left = True
        for place, ticket in self._rows.items():
            if ticket.left:
                self._terms.release(place)
        for ticket in self._queue.drop(lambda ticket: ticket.left):
            ticket.answer.cancel()

    def _may_enter(self, ticket: Ticket) -> bool:
        """A text that is tried alone waits until the batch is empty, and others wait until it is done."""
        return not self._rows if ticket.alone else not any(other.alone for other in self._rows.values())

    def _enter(self, place: int, ticket: Ticket) -> None:
        self._rows[place], self._prompts[place] = ticket, ticket.prompt
        self._terms.promise(place, ticket.terms)

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
        self._batch = self._new_batch()  # before the texts are taken out: if it fails, they are still known
        tickets = list(self._rows.values())
        self._rows.clear()
        self._prompts.clear()
        self._entering.clear()
        if len(tickets) == 1:
            _fail(tickets[0], error)
            return
        for ticket in tickets:
            ticket.alone = True
            if ticket.left:
                ticket.answer.cancel()
        with self._changed:
            self._queue.put_first([ticket for ticket in tickets if not ticket.left])


def _fail(ticket: Ticket, error: Exception) -> None:
    with suppress(InvalidStateError):
        ticket.answer.set_exception(error)
