"""The engine: memory, errors that name their row, and what it leaves alone. That its vectors are right is law 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import doubles
from genembed import Budget, ConfigurationError, FixedSteps, NonFiniteError, OutOfMemoryError, Pooling, Progress
from genembed.backbone import Backbone
from genembed.decode import surviving_order
from genembed.engine import Engine
from genembed.halting import HaltingRule
from genembed.packed import PackedRows
from genembed.tokens import TokenIds

PROMPTS = doubles.prompts([9, 3, 12, 5, 9, 1, 7])
SCHEDULE = doubles.Schedule((3, 1, 5, 2, 4, 5, 1))
ONE_BATCH = Budget(length_ratio=50.0)


def run(engine: Engine, rule: HaltingRule = SCHEDULE, prompts: Sequence[TokenIds] = PROMPTS, **options: Any) -> dict[int, np.ndarray]:
    """Return the vectors by row, and fail if a row came twice."""
    found: dict[int, np.ndarray] = {}
    for refined in engine.run(prompts, rule, **options):
        for index, vector in zip(refined.index.tolist(), refined.vectors, strict=True):
            assert index not in found
            found[index] = vector
    return found


def assert_same(found: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for row, vector in expected.items():
        np.testing.assert_allclose(found[row], vector, atol=2e-7)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
@examples(max_examples=150)
def test_survivors_close_the_gaps_and_move_only_if_they_must(finished: list[bool]) -> None:
    order = surviving_order(torch.tensor(finished)).tolist()
    survivors = [row for row, done in enumerate(finished) if not done]
    assert sorted(order) == survivors
    assert all(order[row] == row for row in survivors if row < len(survivors))


def out_of_memory_above(rows: int, error: Callable[[], BaseException]) -> Callable[[pytest.MonkeyPatch], None]:
    """Let the pool of keys and values run out of memory as soon as it has more than so many rows."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        generate = PackedRows.generate

        def small(self: PackedRows) -> None:
            if len(self) > rows:
                raise error()
            generate(self)

        monkeypatch.setattr(PackedRows, "generate", small)

    return install


ERRORS: dict[str, Callable[[], BaseException]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError,
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
}


@pytest.mark.parametrize("kind", list(ERRORS))
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_batch_that_does_not_fit_is_split_and_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch, rows: int, kind: str) -> None:
    engine = Engine(doubles.backbone("qwen2"), ONE_BATCH)
    expected = run(engine)
    out_of_memory_above(rows, ERRORS[kind])(monkeypatch)
    assert_same(run(engine), expected)


def test_memory_that_runs_out_after_some_rows_were_finished_loses_and_repeats_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(doubles.backbone("qwen2"), Budget(length_ratio=50.0, max_rows=4))
    later = replace(SCHEDULE, first_row=40)
    expected = run(engine, later, first_row=40)
    generate, calls = PackedRows.generate, iter(range(1000))

    def once(self: PackedRows) -> None:
        if next(calls) == 3:
            raise MemoryError
        generate(self)

    monkeypatch.setattr(PackedRows, "generate", once)
    assert_same(run(engine, later, first_row=40), expected)
    assert next(calls) > 4


def test_memory_that_runs_out_while_prompts_are_read_splits_the_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(doubles.backbone("qwen2"), ONE_BATCH)
    expected = run(engine)
    admit = PackedRows.admit

    def small(self: PackedRows, prompts: Sequence[TokenIds]) -> None:
        if len(prompts) > 2:
            raise MemoryError
        admit(self, prompts)

    monkeypatch.setattr(PackedRows, "admit", small)
    assert_same(run(engine), expected)


def test_a_single_row_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """text-embeddings-inference loops for ever on an input that can never fit (its issues 694 and 723)."""
    out_of_memory_above(0, MemoryError)(monkeypatch)
    with pytest.raises(
        OutOfMemoryError, match=r"row 102: one text of 12 tokens does not fit .*use a smaller max_length, a smaller model"
    ) as large:
        run(Engine(doubles.backbone("qwen2"), ONE_BATCH), prompts=PROMPTS[:3], rule=FixedSteps(2), first_row=100)
    assert large.value.row == 102


def test_an_error_that_has_nothing_to_do_with_memory_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(0, lambda: RuntimeError("expected scalar type Float"))(monkeypatch)
    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        run(Engine(doubles.backbone("qwen2")))


@pytest.mark.parametrize("family", ["qwen2", "mistral-window", "gemma2", "bert"])
@pytest.mark.parametrize("shared", [0, 6])
def test_memory_that_was_never_written_reaches_no_vector(family: str, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool is allocated and not cleared; what lies there may be NaN, and NaN times a weight of zero is NaN."""
    engine = Engine(doubles.backbone(family), ONE_BATCH)
    prompts = doubles.prompts([9, 3, 12, 5, 9, 1, 7], shared=shared)
    expected = run(engine, prompts=prompts)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **options: new_empty(self, *size, **options).fill_(torch.nan))
    assert_same(run(engine, prompts=prompts), expected)


def poisoned(token: int, *, family: str = "mistral") -> Backbone:
    """Return a backbone whose input embedding of one token is not a number."""
    backbone = doubles.trainable(doubles.backbone(family, pooling=Pooling(kind="last")))
    backbone.model.requires_grad_(False)
    backbone.table[token] = torch.nan
    return backbone


def test_a_vector_that_is_not_finite_is_an_error_that_names_its_row() -> None:
    """ollama and text-embeddings-inference have answered such rows with zeros, or null, and a status of success."""
    prompts = [*PROMPTS, np.array([4, 5, 6])]
    token = next(number for number in range(3, doubles.VOCAB) if all(number not in ids for ids in PROMPTS))
    prompts[7] = np.array([4, token])
    with pytest.raises(
        NonFiniteError, match=r"row 57: the embedding is not finite or is zero after 0 steps; check the model's weights"
    ) as bad:
        run(Engine(poisoned(token)), FixedSteps(0), prompts, first_row=50)
    assert bad.value.row == 57
    assert len(run(Engine(poisoned(token)), FixedSteps(0), PROMPTS)) == 7


def test_a_vector_of_zeros_is_an_error_too() -> None:
    backbone = doubles.trainable(doubles.backbone("qwen2"))
    backbone.model.requires_grad_(False)
    backbone.base.norm.weight.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(NonFiniteError, match=r"row 0: the embedding is not finite or is zero after 2 steps"):
        run(Engine(backbone), FixedSteps(2), PROMPTS[:1])


def test_a_text_longer_than_the_learned_positions_is_refused_before_any_work() -> None:
    engine = Engine(doubles.backbone("gpt2"))
    long = doubles.prompts([120])
    assert list(run(engine, FixedSteps(8), long)) == [0]
    with pytest.raises(
        ConfigurationError, match=r"120 prompt tokens and 9 steps need 129 positions, but this model has 128; use a smaller max_l"
    ):
        run(engine, FixedSteps(9), long)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    budget=st.builds(
        Budget,
        batch_tokens=st.integers(1, 300),
        max_rows=st.integers(1, 8),
        length_ratio=st.sampled_from([1.0, 1.5, 50.0]),
        native=st.just(False),  # whose rows are made elsewhere, some of them to compare two ways
    ),
)
@examples(max_examples=20)
def test_no_pool_is_larger_than_the_budget_or_one_text(lengths: list[int], budget: Budget) -> None:
    pools: list[tuple[int, int]] = []

    class Watched(PackedRows):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            pools.append((self.max_rows, self.max_tokens))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genembed.decode.PackedRows", Watched)
        run(Engine(doubles.backbone("qwen2"), budget), FixedSteps(2), doubles.prompts(lengths))
    assert pools
    for rows, tokens in pools:
        assert rows <= budget.max_rows
        assert rows * tokens <= max(budget.batch_tokens, max(lengths) + 2)


def test_a_one_pass_run_keeps_no_keys_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    admit = PackedRows.admit

    def spy(self: PackedRows, prompts: Sequence[TokenIds]) -> None:
        admit(self, prompts)
        kept.append(len(self._keys))

    monkeypatch.setattr(PackedRows, "admit", spy)
    run(Engine(doubles.backbone("qwen2", pooling=Pooling(kind="last"))), FixedSteps(0), doubles.prompts([4, 7]))
    assert set(kept) == {0}


def test_no_graph_is_built_and_the_callers_gradient_mode_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    generate = PackedRows.generate

    def spy(self: PackedRows) -> None:
        modes.append(torch.is_grad_enabled())
        generate(self)

    monkeypatch.setattr(PackedRows, "generate", spy)
    for _ in Engine(doubles.backbone("qwen2")).run(PROMPTS, SCHEDULE):
        modes.append(not torch.is_grad_enabled())
    assert len(modes) > 5
    assert not any(modes)


def test_a_caller_that_stops_listening_leaves_the_engine_as_it_was() -> None:
    engine = Engine(doubles.backbone("qwen2"))
    expected = run(engine)
    results: Iterator[Any] = engine.run(PROMPTS, SCHEDULE)
    next(results)
    del results
    assert_same(run(engine), expected)


def test_no_prompts_give_no_results() -> None:
    assert run(Engine(doubles.backbone("qwen2")), prompts=[]) == {}


@dataclass(frozen=True)
class Never:
    """A rule that breaks its promise: it names a last step and finishes no row there."""

    max_steps: int = 3
    window: int = 0

    def __call__(self, progress: Progress) -> torch.Tensor:
        return torch.zeros(len(progress), dtype=torch.bool)


def test_every_text_halts_at_max_steps_whatever_the_rule_says() -> None:
    """A rule of a user's own that forgets its last step must not run for ever, or off the end of the pool."""
    refined = list(Engine(doubles.backbone("qwen2")).run(PROMPTS[:2], Never()))
    assert [step for batch in refined for step in batch.steps.tolist()] == [3, 3]


@pytest.fixture
def prefixes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prefixes that are read, in order."""
    lengths: list[int] = []
    share = PackedRows.share

    def spy(self: PackedRows, prefix: TokenIds) -> object:
        lengths.append(len(prefix))
        return share(self, prefix)

    monkeypatch.setattr(PackedRows, "share", spy)
    return lengths


INSTRUCTED = doubles.prompts([3, 5, 4], shared=9)


def test_an_instruction_is_read_once_for_all_calls_and_changes_no_vector(prefixes_read: list[int]) -> None:
    backbone, rule = doubles.backbone("qwen2"), FixedSteps(3)
    engine = Engine(backbone)
    expected = run(Engine(backbone, Budget(min_prefix=100)), rule, INSTRUCTED)
    for row, prompt in enumerate(INSTRUCTED):
        assert_same(run(engine, rule, [prompt], first_row=row, shared=9), {row: expected[row]})
    assert_same(run(engine, rule, INSTRUCTED, shared=9), expected)
    assert prefixes_read == [9]


def test_what_texts_of_one_call_share_beyond_the_instruction_is_read_with_it_and_not_kept(prefixes_read: list[int]) -> None:
    engine = Engine(doubles.backbone("qwen2"))
    for _ in range(2):
        run(engine, FixedSteps(2), INSTRUCTED, shared=3)
    assert prefixes_read == [9, 9]
    run(engine, FixedSteps(2), INSTRUCTED, shared=7)  # two tokens more are not worth a prefix of their own
    run(engine, FixedSteps(2), INSTRUCTED[:1], shared=7)
    assert prefixes_read == [9, 9, 7]


def test_a_text_that_begins_unusually_shares_what_it_does_share(prefixes_read: list[int]) -> None:
    """Guards against a prefix that is taken from the template where a text changed its last token."""
    engine, odd = Engine(doubles.backbone("qwen2")), INSTRUCTED[0].copy()
    odd[8] = (odd[8] + 1) % doubles.VOCAB
    expected = run(Engine(doubles.backbone("qwen2"), Budget(min_prefix=100)), FixedSteps(2), [INSTRUCTED[1], odd])
    assert_same(run(engine, FixedSteps(2), [INSTRUCTED[1], odd], shared=9), expected)
    assert prefixes_read == [8]


def test_the_oldest_instruction_is_forgotten_first(prefixes_read: list[int]) -> None:
    engine = Engine(doubles.backbone("qwen2"), Budget(kept_prefixes=2))
    one, other, third = (doubles.prompts([3], seed=seed, shared=9) for seed in range(3))
    for prompts in (one, other, one, third, one, other):
        run(engine, FixedSteps(1), prompts, shared=9)
    assert len(prefixes_read) == 4  # one, other, third, and other again


def test_a_changed_weight_makes_a_kept_instruction_worthless(prefixes_read: list[int]) -> None:
    """Guards against an evaluation during training that reads texts under the instruction as it was."""
    backbone = doubles.trainable(doubles.backbone("qwen2"))
    engine = Engine(backbone)
    run(engine, FixedSteps(1), INSTRUCTED[:1], shared=9)
    with torch.no_grad():
        next(iter(backbone.model.parameters())).mul_(1.5)
    expected = run(Engine(backbone, Budget(min_prefix=100)), FixedSteps(1), INSTRUCTED[:1])
    assert_same(run(engine, FixedSteps(1), INSTRUCTED[:1], shared=9), expected)
    assert prefixes_read == [9, 9]


@pytest.mark.parametrize("name", ["batch_tokens", "max_rows", "prefill_tokens", "min_prefix"])
def test_a_budget_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=0: must be at least 1"):
        Budget(**{name: 0})


def test_a_negative_number_of_kept_prefixes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="kept_prefixes=-1: must be at least 0"):
        Budget(kept_prefixes=-1)


def test_a_length_ratio_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"length_ratio=0\.5: must be at least 1"):
        Budget(length_ratio=0.5)
