"""Recorded steps: used when they are there, left out when they are wrong, kept for later batches. That they are right is law 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import doubles
from genembed import Budget, ConfigurationError, FixedSteps
from genembed.engine import Engine
from genembed.errors import GenembedWarning
from genembed.graphs import FixedStep, Recorder, RowsCache, bucket_of

PROMPTS = doubles.prompts([9, 3, 12, 5, 9, 1, 7])
SCHEDULE = doubles.Schedule((3, 1, 5, 2, 4, 5, 1))
BUDGET = Budget(max_rows=4, length_ratio=50.0)


class Counted(doubles.Replayed):
    """Counts what is recorded and what is replayed."""

    recorded = replayed = 0

    def __init__(self, step: FixedStep) -> None:
        super().__init__(step)
        type(self).recorded += 1
        again = self.replay

        def replay() -> None:
            type(self).replayed += 1
            again()

        self.replay = replay


class Wrong(doubles.Replayed):
    """Replays something else, as a graph does whose tensors have moved."""

    def __init__(self, step: FixedStep) -> None:
        def replay() -> None:
            step.run()
            step.hidden.neg_()

        self.replay = replay


@pytest.fixture(autouse=True)
def fresh_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "recorded", 0)
    monkeypatch.setattr(Counted, "replayed", 0)
    monkeypatch.setattr("genembed.graphs.WARM_UP", 1)


def vectors(engine: Engine) -> np.ndarray:
    found = np.zeros((len(PROMPTS), doubles.HIDDEN), dtype=np.float32)
    for done in engine.run(PROMPTS, SCHEDULE):
        found[done.index] = done.vectors
    return found


def recording(record: Recorder) -> Engine:
    engine = Engine(doubles.backbone("qwen2"), BUDGET)
    engine.kept = RowsCache(engine.backbone, record=record)
    return engine


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return vectors(Engine(doubles.backbone("qwen2"), BUDGET))


def test_steps_are_recorded_once_for_a_bucket_and_replayed_in_later_runs(plain: np.ndarray) -> None:
    engine = recording(Counted)
    np.testing.assert_allclose(vectors(engine), plain, atol=2e-7)
    recorded, replayed = Counted.recorded, Counted.replayed
    assert 1 <= recorded <= 3, "buckets of 1, 2 and 4 rows"
    assert replayed > recorded
    for _ in range(3):
        np.testing.assert_allclose(vectors(engine), plain, atol=2e-7)
    assert Counted.recorded <= 3
    assert Counted.replayed >= 2 * replayed


def test_batches_that_overlap_have_rows_of_their_own() -> None:
    engine = recording(Counted)
    first, second = engine.run(PROMPTS, FixedSteps(3)), engine.run(PROMPTS[::-1], FixedSteps(3))
    expected = {}
    for done in Engine(doubles.backbone("qwen2")).run(PROMPTS, FixedSteps(3)):
        expected.update(zip(done.index.tolist(), done.vectors, strict=True))
    for done, other in zip(first, second, strict=True):
        for row, vector in zip(done.index, done.vectors, strict=True):
            np.testing.assert_allclose(vector, expected[int(row)], atol=2e-7)
        for row, vector in zip(other.index, other.vectors, strict=True):
            np.testing.assert_allclose(vector, expected[len(PROMPTS) - 1 - int(row)], atol=2e-7)


def refuses(step: FixedStep) -> doubles.Replayed:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("record", "reason"), [(refuses, "RuntimeError: operation not permitted"), (Wrong, "a replay differs from the step by 2")]
)
def test_a_step_that_cannot_be_recorded_or_replayed_is_launched_as_before(record: Recorder, reason: str, plain: np.ndarray) -> None:
    engine = recording(record)
    with pytest.warns(GenembedWarning, match=f"steps are not recorded as CUDA graphs but launched one by one .{reason}"):
        np.testing.assert_allclose(vectors(engine), plain, atol=2e-7)


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert not isinstance(Engine(doubles.backbone("qwen2"), Budget(record_steps=True)).kept, RowsCache)


def test_a_finished_row_that_has_not_been_seen_yet_stays_as_it_was(monkeypatch: pytest.MonkeyPatch, plain: np.ndarray) -> None:
    """And the rows are looked at less often."""
    looks = 0
    select = torch.Tensor.nonzero

    def counted(self: torch.Tensor) -> torch.Tensor:
        nonlocal looks
        looks += 1
        return select(self)

    monkeypatch.setattr(torch.Tensor, "nonzero", counted)
    one_batch = Budget(length_ratio=50.0, check_every=1)
    np.testing.assert_allclose(vectors(Engine(doubles.backbone("qwen2"), one_batch)), plain, atol=2e-7)
    often, looks = looks, 0
    np.testing.assert_allclose(vectors(Engine(doubles.backbone("qwen2"), Budget(length_ratio=50.0, check_every=5))), plain, atol=2e-7)
    assert looks < often


@pytest.mark.parametrize(("rows", "most", "bucket"), [(1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 6, 6), (8, 8, 8)])
def test_buckets_are_powers_of_two_within_the_slots(rows: int, most: int, bucket: int) -> None:
    assert bucket_of(rows, most) == bucket


def test_looking_never_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="check_every=0: must be at least 1"):
        Budget(check_every=0)
