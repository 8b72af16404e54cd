"""The engine as a service: what it answers is what `refine` gives, whoever else asks, and one text's trouble is its own."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from genembed import Budget, ConfigurationError, ConvergeStop, Embedder, FixedSteps, load
from genembed.backbone import Backbone
from genembed.errors import InputError, NonFiniteError
from genembed.halting import HaltingRule
from genembed.packed import PackedRows
from genembed.serve.live import ClosedError, DeadlineError, LiveEngine, OverloadedError
from genembed.serve.queueing import Ticket, answers_of
from genembed.serve.terms import MAX_PATIENCE, Terms

TEXTS = [
    "a claim",
    "What is a business trip?",
    "Alpha-lipoic acid lowers fasting glucose in patients with diabetes.",
    "A language model refines the vector of a text step by step, and stops when it is stable.",
    "x",
    "step by step",
]
RULES = [
    FixedSteps(6),
    FixedSteps(1),
    ConvergeStop(0.9, max_steps=6),
    ConvergeStop(0.97, patience=1, max_steps=5),
    ConvergeStop(2.0, max_steps=4),
]
PATIENCE_SECONDS = 30.0
Patch = pytest.MonkeyPatch


@pytest.fixture
def patch(monkeypatch: Patch) -> Patch:
    return monkeypatch


@pytest.fixture
def embedder(folder_of: Callable[..., Any]) -> Embedder:
    return load(folder_of("qwen2"), dtype="float64", budget=Budget(pack_weights=False))


@pytest.fixture
def live(embedder: Embedder) -> Iterator[LiveEngine]:
    engine = LiveEngine(embedder, max_rows=4, max_steps=6)
    yield engine
    engine.close(grace=PATIENCE_SECONDS)


def asked(live: LiveEngine, embedder: Embedder, texts: list[str], rule: Any, **terms: Any) -> list[Ticket]:
    ids = embedder.tokenizer(texts).ids
    return live.submit(ids, [Terms(rule=rule, **terms)] * len(ids))


class Gate:
    """Lets the model read one step or prompt after the other, when it is told to."""

    def __init__(self, backbone: Backbone, patch: Patch) -> None:
        self.open, self.passes = threading.Semaphore(0), 0
        forward = backbone.forward_packed

        def held(*arguments: Any, **options: Any) -> torch.Tensor:
            assert self.open.acquire(timeout=PATIENCE_SECONDS)
            self.passes += 1
            return forward(*arguments, **options)

        patch.setattr(backbone, "forward_packed", held)

    def let(self, passes: int) -> None:
        """Let so many passes happen, and wait for them."""
        goal = self.passes + passes
        for _ in range(passes):
            self.open.release()
        until(lambda: self.passes >= goal)

    def free(self) -> None:
        """Hold nothing any more."""
        for _ in range(1_000):
            self.open.release()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_every_answer_is_what_refine_gives_whoever_else_asks(live: LiveEngine, embedder: Embedder) -> None:
    expected = {rule: embedder.refine(TEXTS, halt=rule) for rule in RULES}
    found: dict[Any, list[Ticket]] = {}

    def client(rule: Any) -> None:
        found[rule] = asked(live, embedder, TEXTS, rule)

    clients = [threading.Thread(target=client, args=(rule,)) for rule in RULES]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    for rule, tickets in found.items():
        for row, ticket in enumerate(tickets):
            answer = ticket.answer.result(PATIENCE_SECONDS)
            assert (answer.steps, answer.complete) == (expected[rule].steps[row], True)
            np.testing.assert_allclose(answer.vector, expected[rule].vectors[row], atol=2e-7)
    assert live.queued_tokens == live.under_way == 0
    assert live.answered == len(RULES) * len(TEXTS)


def test_a_newcomer_joins_at_the_next_step_and_a_halted_text_is_answered_at_once(
    live: LiveEngine, embedder: Embedder, patch: Patch
) -> None:
    gate = Gate(embedder.backbone, patch)
    (long,) = asked(live, embedder, TEXTS[3:4], FixedSteps(6))
    gate.let(3)  # its prompt and two steps
    (short,) = asked(live, embedder, TEXTS[:1], FixedSteps(1))
    gate.let(3)  # a step may have begun; then the newcomer's prompt, and one step of both
    until(short.answer.done)
    assert not long.answer.done()
    gate.free()
    assert long.answer.result(PATIENCE_SECONDS).steps == 6


def test_a_text_whose_time_is_up_gets_the_best_vector_there_is(live: LiveEngine, embedder: Embedder, patch: Patch) -> None:
    trajectory = embedder.refine(TEXTS[:1], steps=6, keep_trajectory=True).trajectory
    assert trajectory is not None
    gate = Gate(embedder.backbone, patch)
    (hurried,) = asked(live, embedder, TEXTS[:1], FixedSteps(6), deadline=time.monotonic() - 1)
    (patient,) = asked(live, embedder, TEXTS[:1], FixedSteps(6), deadline=time.monotonic() + 1_000)
    gate.free()
    answer = hurried.answer.result(PATIENCE_SECONDS)
    assert (answer.steps, answer.complete) == (1, False), "this model has no vector before its first step"
    np.testing.assert_allclose(answer.vector, trajectory[0, 0], atol=2e-7)
    assert patient.answer.result(PATIENCE_SECONDS).complete


def test_a_text_that_nobody_waits_for_leaves_within_two_steps(live: LiveEngine, embedder: Embedder, patch: Patch) -> None:
    gate = Gate(embedder.backbone, patch)
    (given_up,) = asked(live, embedder, TEXTS[:1], FixedSteps(6))
    (stays,) = asked(live, embedder, TEXTS[3:4], FixedSteps(6))
    gate.let(3)
    live.leave([given_up])
    gate.let(2)
    until(given_up.answer.cancelled)
    assert live.under_way == 1
    gate.free()
    assert stays.answer.result(PATIENCE_SECONDS).steps == 6


def test_texts_that_left_while_they_waited_are_never_read(live: LiveEngine, embedder: Embedder, patch: Patch) -> None:
    gate = Gate(embedder.backbone, patch)
    first = asked(live, embedder, TEXTS[:4], FixedSteps(1))
    waiting = asked(live, embedder, TEXTS[4:], FixedSteps(1))
    live.leave(waiting)
    gate.let(2)
    wait([ticket.answer for ticket in first], PATIENCE_SECONDS)
    gate.free()
    until(lambda: live.queued_tokens == 0)
    assert gate.passes == 2
    for ticket in waiting:
        with pytest.raises(CancelledError):
            ticket.answer.result(PATIENCE_SECONDS)


def test_a_queue_that_is_full_refuses_a_request_whole_and_says_when_to_come_back(embedder: Embedder, patch: Patch) -> None:
    gate = Gate(embedder.backbone, patch)
    live = LiveEngine(embedder, max_rows=1, max_queue_tokens=60, max_steps=6)
    (first,) = asked(live, embedder, TEXTS[:1], FixedSteps(1))
    until(lambda: live.under_way == 1)
    fits = asked(live, embedder, TEXTS[:3], FixedSteps(1))
    queued = live.queued_tokens
    with pytest.raises(OverloadedError, match=r"tokens are waiting, and .* more do not fit into a queue of 60") as refused:
        asked(live, embedder, TEXTS[:3], FixedSteps(1))
    assert refused.value.retry_after >= 1
    assert live.queued_tokens == queued
    gate.free()
    assert all(ticket.answer.result(PATIENCE_SECONDS).steps == 1 for ticket in [first, *fits])
    assert live.close(grace=PATIENCE_SECONDS)


def test_a_queue_takes_what_fills_it_and_not_one_token_more(embedder: Embedder, patch: Patch) -> None:
    gate = Gate(embedder.backbone, patch)
    live = LiveEngine(embedder, max_rows=1, max_queue_tokens=10, max_steps=6)
    asked(live, embedder, TEXTS[:1], FixedSteps(1))
    until(lambda: live.under_way == 1)
    terms = [Terms(rule=FixedSteps(1))]
    live.submit([np.zeros(7, dtype=np.int64)], terms)
    live.check_room(3)
    for refuses in (lambda: live.check_room(4), lambda: live.submit([np.zeros(4, dtype=np.int64)], terms)):
        with pytest.raises(OverloadedError, match="7 tokens are waiting, and 4 more do not fit into a queue of 10"):
            refuses()
    live.submit([np.zeros(3, dtype=np.int64)], terms)
    gate.free()
    assert live.close(grace=PATIENCE_SECONDS)


def test_who_comes_while_a_prompt_is_read_is_read_with_all_others_after_the_next_step(embedder: Embedder, patch: Patch) -> None:
    """Newcomers were read one after the other for as long as any came, and those under way stood still meanwhile."""
    gate, live = Gate(embedder.backbone, patch), LiveEngine(embedder, max_rows=8, max_steps=6)
    read, whole = list[list[int]](), PackedRows.admit

    def noted(rows: PackedRows, prompts: list[Any]) -> None:
        read.append([len(ids) for ids in prompts])
        whole(rows, prompts)

    patch.setattr(PackedRows, "admit", noted)
    asked(live, embedder, TEXTS[:1], FixedSteps(2))
    until(lambda: live.under_way == 1)
    others = [asked(live, embedder, [text], FixedSteps(6))[0] for text in (*TEXTS, *TEXTS)][:7]
    gate.let(2)  # the first prompt, and a step of it alone
    assert live.steps_done == 0
    assert len(read) == 1
    gate.free()
    wait([ticket.answer for ticket in others], PATIENCE_SECONDS)
    assert read[1] == sorted(read[1], reverse=True), "the longest first: those of one length are read together"
    assert len(read[1]) == 7
    assert live.close(grace=PATIENCE_SECONDS)


@pytest.mark.parametrize(("newcomers", "steps"), [(1, 2), (2, 1)])
def test_newcomers_wait_a_step_more_where_they_are_few_beside_many(newcomers: int, steps: int, embedder: Embedder, patch: Patch) -> None:
    gate, live = Gate(embedder.backbone, patch), LiveEngine(embedder, max_rows=8, max_steps=6)
    passes_before, whole = list[int](), PackedRows.admit

    def noted(rows: PackedRows, prompts: list[Any]) -> None:
        passes_before.append(gate.passes)
        whole(rows, prompts)

    patch.setattr(PackedRows, "admit", noted)
    many = asked(live, embedder, TEXTS[:5], FixedSteps(6))
    until(lambda: live.under_way == 5)
    few = asked(live, embedder, TEXTS[:newcomers], FixedSteps(6))
    gate.free()
    wait([ticket.answer for ticket in (*many, *few)], PATIENCE_SECONDS)
    assert passes_before == [0, 1 + steps]
    assert live.close(grace=PATIENCE_SECONDS)


def test_a_request_is_over_with_its_first_failure_and_whoever_waits_need_not_be_there_any_more(embedder: Embedder) -> None:
    tickets = [Ticket(np.zeros(1, dtype=np.int64), Terms(rule=FixedSteps(1))) for _ in range(3)]

    async def waits() -> None:
        waiting = asyncio.ensure_future(answers_of(tickets))
        await asyncio.sleep(0)
        tickets[1].answer.set_exception(MemoryError("second"))
        with pytest.raises(MemoryError, match="second"):
            await waiting

    asyncio.run(waits())
    tickets[0].answer.set_exception(MemoryError("first"))  # the loop is closed
    with pytest.raises(MemoryError, match="first"):
        tickets[0].answer.result()


def test_a_request_that_an_empty_queue_cannot_hold_is_refused(embedder: Embedder) -> None:
    tokens = sum(len(ids) for ids in embedder.tokenizer(TEXTS).ids)
    live = LiveEngine(embedder, max_rows=2, max_queue_tokens=tokens, max_steps=6)
    with pytest.raises(InputError, match=rf"the {tokens + 1} tokens of this request do not fit into a queue of {tokens}; send several"):
        live.submit([*embedder.tokenizer(TEXTS).ids, np.zeros(1, dtype=np.int64)], [Terms(rule=FixedSteps(1))] * (len(TEXTS) + 1))
    assert len(wait([ticket.answer for ticket in asked(live, embedder, TEXTS, FixedSteps(1))], PATIENCE_SECONDS).done) == len(TEXTS)
    assert live.close(grace=PATIENCE_SECONDS)


def test_a_short_request_is_not_held_by_a_long_one_before_it(embedder: Embedder, patch: Patch) -> None:
    gate = Gate(embedder.backbone, patch)
    live = LiveEngine(embedder, max_rows=2, max_steps=6)
    long = asked(live, embedder, TEXTS * 10, FixedSteps(1))
    until(lambda: live.under_way == 2)
    (short,) = asked(live, embedder, TEXTS[:1], FixedSteps(1))
    gate.let(4)  # the first two texts, then one more of the long request and the short one
    until(short.answer.done)
    assert sum(ticket.answer.done() for ticket in long) <= 3
    gate.free()
    assert live.close(grace=PATIENCE_SECONDS)


def test_a_deadline_that_passes_in_the_queue_is_told_at_once(embedder: Embedder, patch: Patch) -> None:
    gate = Gate(embedder.backbone, patch)
    live = LiveEngine(embedder, max_rows=1, max_steps=6)
    (first,) = asked(live, embedder, TEXTS[:1], FixedSteps(6))
    until(lambda: live.under_way == 1)
    (late,) = asked(live, embedder, TEXTS[:1], FixedSteps(6), deadline=time.monotonic() + 0.01)
    (patient,) = asked(live, embedder, TEXTS[:1], FixedSteps(6), deadline=time.monotonic() + 1_000)
    time.sleep(0.02)
    gate.let(2)
    with pytest.raises(DeadlineError, match="passed while the text waited"):
        late.answer.result(PATIENCE_SECONDS)
    assert not first.answer.done()
    gate.free()
    assert patient.answer.result(PATIENCE_SECONDS).complete
    assert live.queued_tokens == 0
    assert live.close(grace=PATIENCE_SECONDS)


def test_an_engine_that_cannot_go_on_answers_everybody_and_takes_nothing_new(live: LiveEngine, embedder: Embedder, patch: Patch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError

    patch.setattr(embedder.backbone, "embed", broken)
    patch.setattr(live, "_new_batch", broken)
    for ticket in asked(live, embedder, TEXTS, FixedSteps(1)):
        with pytest.raises(MemoryError):
            ticket.answer.result(PATIENCE_SECONDS)
    until(lambda: not live._thread.is_alive())
    with pytest.raises(ClosedError):
        asked(live, embedder, TEXTS[:1], FixedSteps(1))


def test_texts_that_left_are_not_tried_again_after_a_failed_batch(live: LiveEngine, embedder: Embedder, patch: Patch) -> None:
    gate = Gate(embedder.backbone, patch)
    stays, goes = asked(live, embedder, TEXTS[:2], FixedSteps(6))
    gate.let(1)
    step = embedder.backbone.next_embeddings
    fails = iter([True])

    def once(states: torch.Tensor) -> torch.Tensor:
        if next(fails, False):
            live.leave([goes])
            live._admit()
            raise RuntimeError("once")
        return step(states)

    patch.setattr(embedder.backbone, "next_embeddings", once)
    gate.free()
    assert stays.answer.result(PATIENCE_SECONDS).steps == 6
    assert goes.answer.cancelled()
    assert live.answered == 1


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), MemoryError(), ZeroDivisionError("surprise")])
def test_one_poisoned_text_fails_alone(live: LiveEngine, embedder: Embedder, patch: Patch, error: Exception) -> None:
    poison = int(embedder.tokenizer(["zebra"]).ids[0][0])
    admit = embedder.backbone.embed

    def fails(ids: torch.Tensor) -> torch.Tensor:
        if bool((ids == poison).any()):
            raise error
        return admit(ids)

    expected = embedder.refine(TEXTS[:3], steps=4).vectors
    patch.setattr(embedder.backbone, "embed", fails)
    tickets = asked(live, embedder, [*TEXTS[:3], "zebra"], FixedSteps(4))
    with pytest.raises(type(error)):
        tickets[3].answer.result(PATIENCE_SECONDS)
    for ticket, vector in zip(tickets[:3], expected, strict=True):
        np.testing.assert_allclose(ticket.answer.result(PATIENCE_SECONDS).vector, vector, atol=2e-7)
    assert asked(live, embedder, TEXTS[:1], FixedSteps(1))[0].answer.result(PATIENCE_SECONDS).steps == 1


def test_a_vector_that_is_not_finite_is_the_error_of_its_text_alone(live: LiveEngine, embedder: Embedder, patch: Patch) -> None:
    poison = int(embedder.tokenizer(["zebra"]).ids[0][0])
    embed = embedder.backbone.embed
    patch.setattr(embedder.backbone, "embed", lambda ids: embed(ids).masked_fill((ids == poison)[..., None], torch.nan))
    bad, good = asked(live, embedder, ["zebra", TEXTS[1]], FixedSteps(3))
    with pytest.raises(NonFiniteError, match="not finite"):
        bad.answer.result(PATIENCE_SECONDS)
    assert np.isfinite(good.answer.result(PATIENCE_SECONDS).vector).all()


def test_what_a_text_that_is_not_finite_leaves_behind_spoils_no_later_text(live: LiveEngine, embedder: Embedder, patch: Patch) -> None:
    """A short text took the place of such a one, beside a longer text: its masked weights of 0 met NaN."""
    poison = int(embedder.tokenizer(["zebra"]).ids[0][0])
    embed = embedder.backbone.embed
    expected = embedder.refine([TEXTS[4], TEXTS[3]], steps=5).vectors
    patch.setattr(embedder.backbone, "embed", lambda ids: embed(ids).masked_fill((ids == poison)[..., None], torch.nan))
    for bad in asked(live, embedder, [f"zebra {TEXTS[2]}"] * 4, FixedSteps(6)):
        with pytest.raises(NonFiniteError):
            bad.answer.result(PATIENCE_SECONDS)
    good = asked(live, embedder, [TEXTS[4], TEXTS[3]], FixedSteps(5))
    np.testing.assert_allclose([ticket.answer.result(PATIENCE_SECONDS).vector for ticket in good], expected, atol=2e-7)


def test_closing_finishes_what_was_accepted_and_takes_nothing_new(live: LiveEngine, embedder: Embedder) -> None:
    tickets = asked(live, embedder, TEXTS, FixedSteps(6))
    assert live.close(grace=PATIENCE_SECONDS)
    assert [ticket.answer.result(0).steps for ticket in tickets] == [6] * len(TEXTS)
    with pytest.raises(ClosedError, match="takes no new texts"):
        asked(live, embedder, TEXTS[:1], FixedSteps(1))


def test_closing_without_the_time_to_finish_answers_everybody_all_the_same(embedder: Embedder, patch: Patch) -> None:
    gate = Gate(embedder.backbone, patch)
    live = LiveEngine(embedder, max_rows=2, max_steps=6)
    tickets = asked(live, embedder, TEXTS, FixedSteps(6))
    assert not live.close(grace=0.05)
    for ticket in tickets:
        with pytest.raises(ClosedError, match="before this text was embedded"):
            ticket.answer.result(PATIENCE_SECONDS)
    gate.free()


def test_an_engine_without_work_shows_that_it_lives_and_a_frozen_one_does_not(live: LiveEngine, embedder: Embedder, patch: Patch) -> None:
    seen = live.last_sign
    until(lambda: live.last_sign > seen)
    gate = Gate(embedder.backbone, patch)
    (ticket,) = asked(live, embedder, TEXTS[:1], FixedSteps(1))
    until(lambda: live.under_way == 1)
    seen = live.last_sign
    time.sleep(0.7)
    assert live.last_sign == seen
    gate.let(2)
    assert ticket.answer.result(PATIENCE_SECONDS).complete


def test_more_stable_steps_than_are_kept_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigurationError, match=f"patience=9: at most {MAX_PATIENCE} stable steps"):
        Terms(rule=ConvergeStop(0.9, patience=9))


def test_terms_know_whether_the_rule_or_the_deadline_ended_a_text(embedder: Embedder) -> None:
    rules: list[HaltingRule] = [*RULES, ConvergeStop(0.5, patience=2, min_steps=4, max_steps=6)]
    for rule in rules:
        done = embedder.refine(TEXTS, halt=rule)
        for steps, stability in zip(done.steps, done.stability, strict=True):
            terms = Terms(rule=rule, deadline=math.inf)
            assert terms.halted(int(steps), torch.from_numpy(stability))
            for earlier in range(1, int(steps)):
                assert not replace(terms).halted(earlier, torch.from_numpy(stability))
