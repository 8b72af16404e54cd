"""GradCache: the loss and the gradients of the whole batch, with the memory of a chunk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import doubles
from genembed import ConfigurationError
from genembed.refine import refine
from genembed.tokens import TokenBatch
from genembed.train.gradcache import cached_loss
from genembed.train.losses import refinement_regulariser, stepwise_contrastive

ROWS, STEPS, WIDTH = 9, 3, 5

BFLOAT16 = 0.01
"""Relative tolerance of gradients under autocast. Measured: at most 0.003."""


class Toy(torch.nn.Module):
    """Rows in, trajectories out, with dropout in between."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 16, dtype=dtype, device=device)
        self.second = torch.nn.Linear(16, STEPS * WIDTH, dtype=dtype, device=device)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x)))).view(len(x), STEPS, WIDTH)


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def objective(trajectories: Tensor) -> Tensor:
    """Contrast the first third of the rows with the rest, so that every row's gradient depends on every other row."""
    count = max(len(trajectories) // 3, 1)
    positives = torch.arange(count, device=trajectories.device)
    losses = stepwise_contrastive(trajectories[:count], trajectories[count:], temperature=0.1, positives=positives)
    return losses.mean() + refinement_regulariser(losses)


def plain_loss(embed: Callable[[slice], Tensor], rows: int, chunk: int, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """What the cached loss must agree with: all chunks with gradient, all in memory."""
    return loss(torch.cat([embed(slice(start, min(start + chunk, rows))) for start in range(0, rows, chunk)]))


def gradients(model: torch.nn.Module) -> list[Tensor]:
    taken = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    return taken


def both(model: Toy, x: Tensor, chunk: int, factor: float = 1.0) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return the plain and the cached loss, and their gradients, from the same random numbers."""
    results = []
    for take in (plain_loss, cached_loss):
        torch.manual_seed(7)
        loss = take(lambda part: model(x[part]), len(x), chunk, objective)
        (loss * factor).backward()
        results.append((loss.detach(), gradients(model)))
    return results[0][0], results[1][0], results[0][1], results[1][1]


@given(rows=st.integers(2, 12), chunk=st.integers(1, 13), factor=st.sampled_from([1.0, 0.25, 1024.0]))
@settings(max_examples=40)
def test_loss_and_gradients_with_dropout_are_those_of_the_whole_batch(rows: int, chunk: int, factor: float) -> None:
    """The factor is that of a gradient scaler, or of gradients accumulated over batches."""
    plain, cached, expected, got = both(Toy(), inputs(rows), chunk, factor)
    assert cached.item() == plain.item()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * factor)


def test_float32_gradients_agree_to_rounding() -> None:
    plain, cached, expected, got = both(Toy(torch.float32), inputs(dtype=torch.float32), chunk=2)
    assert cached.item() == plain.item()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_the_replay_runs_under_the_autocast_of_the_call(backward_inside: bool) -> None:
    """Guards against a replay in float32, and against one that finds weights cast without gradient and gives them none."""
    model, x, dtypes = Toy(torch.float32), inputs(dtype=torch.float32), set()

    def embed(part: slice) -> Tensor:
        result = model(x[part])
        dtypes.add(result.dtype)
        return result

    taken = []
    for take in (plain_loss, cached_loss):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = take(embed, ROWS, 2, objective)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        taken.append((loss.item(), gradients(model)))
    assert taken[0][0] == taken[1][0]
    assert dtypes == {torch.bfloat16}
    for expected, got in zip(taken[0][1], taken[1][1], strict=True):
        # Without the cache the chunks' gradients are summed in bfloat16, with it in float32.
        assert (got - expected).norm() < BFLOAT16 * expected.norm()


def test_refinement_through_the_cache_has_the_gradients_of_the_whole_batch() -> None:
    """Law 3."""
    backbone = doubles.trainable(doubles.backbone("qwen2"))
    prompts = doubles.prompts([5, 3, 7, 4, 6])

    def embed(part: slice) -> Tensor:
        return refine(backbone, TokenBatch.pad(prompts[part]), steps=3)

    taken = []
    for take in (plain_loss, cached_loss):
        loss = take(embed, len(prompts), 2, objective)
        loss.backward()
        taken.append((loss.item(), gradients(backbone.model)))
    assert taken[0][0] == taken[1][0]
    torch.testing.assert_close(taken[1][1], taken[0][1], rtol=1e-10, atol=1e-10)


def test_accumulated_batches_add_up() -> None:
    model, batches = Toy().eval(), (inputs(6), inputs(9) + 1)
    results = []
    for take in (plain_loss, cached_loss):
        for x in batches:
            (take(lambda part, x=x: model(x[part]), len(x), 4, objective) / 2).backward()
        results.append(gradients(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_two_backward_passes_of_one_loss_give_twice_the_gradient() -> None:
    model, x = Toy(), inputs()
    torch.manual_seed(7)
    loss = cached_loss(lambda part: model(x[part]), ROWS, 2, objective)
    loss.backward(retain_graph=True)
    once = [weight.grad.clone() for weight in model.parameters()]
    loss.backward()
    torch.testing.assert_close(gradients(model), [2 * gradient for gradient in once], rtol=1e-12, atol=1e-12)


def test_parameters_of_the_loss_get_their_gradient() -> None:
    model, x = Toy().eval(), inputs()
    scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    results = []
    for take in (plain_loss, cached_loss):
        take(lambda part: model(x[part]), ROWS, 4, lambda z: objective(z) * scale).backward()
        results.append([scale.grad.clone(), *gradients(model)])
        scale.grad = None
    assert results[1][0] != 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_the_replay_leaves_the_random_generator_as_it_found_it() -> None:
    model, x = Toy(), inputs()
    loss = cached_loss(lambda part: model(x[part]), ROWS, 2, objective)
    torch.rand(1)  # as the first pass left it, the last chunk's replay would leave it anyway
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient_the_value_is_plain_and_each_chunk_is_embedded_once(mode: type[torch.no_grad | torch.inference_mode]) -> None:
    model, x, calls = Toy(), inputs(), []

    def embed(part: slice) -> Tensor:
        calls.append((part.start, part.stop))
        return model(x[part])

    values = []
    for take in (plain_loss, cached_loss):
        torch.manual_seed(7)
        with mode():
            values.append(take(embed, ROWS, 4, objective))
    assert values[0].item() == values[1].item()
    assert not values[1].requires_grad
    assert calls == [(0, 4), (4, 8), (8, 9)] * 2


def test_every_chunk_is_embedded_once_without_gradient_and_once_with_it() -> None:
    model, x, calls = Toy(), inputs(), []

    def embed(part: slice) -> Tensor:
        calls.append((part.start, torch.is_grad_enabled()))
        return model(x[part])

    loss = cached_loss(embed, ROWS, 4, objective)
    assert calls == [(0, False), (4, False), (8, False)]
    loss.backward()
    assert calls[3:] == [(0, True), (4, True), (8, True)]


@pytest.mark.parametrize(("chunk", "chunks", "expected"), [(4, 1, [4, 4, 1]), (4, 3, [4, 4, 1]), (9, 4, [2, 2, 2, 3]), (1, 9, [1] * 9)])
def test_as_many_chunks_are_made_as_another_process_makes(chunk: int, chunks: int, expected: list[int]) -> None:
    """Where weights are in parts, each call of the model is one of all processes, whatever number of rows each has."""
    model, x, sizes = Toy().eval(), torch.randn(ROWS, 4, dtype=torch.float64), []

    def embed(part: slice) -> Tensor:
        sizes.append(part.stop - part.start)
        return model(x[part])

    cached_loss(embed, ROWS, chunk, lambda z: z.square().sum(), chunks=chunks).backward()
    assert sizes == 2 * expected
    found = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, [weight.grad for weight in model.parameters()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [0, ROWS + 1])
def test_more_chunks_than_rows_are_refused(chunks: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"9 texts cannot be cut into {chunks} chunks.*use a larger chunk"):
        cached_loss(lambda part: torch.zeros(part.stop - part.start, 1, 1), ROWS, 1, lambda z: z.sum(), chunks=chunks)


def test_one_chunk_for_all_rows_is_embedded_only_once() -> None:
    model, x, calls = Toy(), inputs(), []

    def embed(part: slice) -> Tensor:
        calls.append(part)
        return model(x[part])

    cached_loss(embed, ROWS, ROWS, objective).backward()
    assert calls == [slice(0, ROWS)]


def test_gradients_travel_with_the_last_chunk_alone() -> None:
    model, x, inside, seen = Toy(), inputs(), [False], []

    @contextmanager
    def no_sync() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def embed(part: slice) -> Tensor:
        result = model(x[part])
        if result.requires_grad:
            seen.append(("forward", part.start, inside[0]))
            result.register_hook(lambda _gradient: seen.append(("backward", part.start, inside[0])))
        return result

    cached_loss(embed, ROWS, 4, objective, no_sync=no_sync).backward()
    assert seen == [(way, start, start < 8) for start in (0, 4, 8) for way in ("forward", "backward")]


class Saved:
    """Counts the numbers that autograd holds for the backward pass, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        def held() -> Tensor:
            return tensor

        weakref.finalize(held, self.free, tensor.numel())
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        return held

    def free(self, count: int) -> None:
        self.now -= count

    def most_of(self, take: Callable[..., Tensor], rows: int) -> int:
        """Return the most that embedding `rows` rows held at any time."""
        model, x = Toy(), inputs(rows)

        def embed(part: slice) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda held: held()):
                return model(x[part])

        take(embed, rows, 4, objective).backward()
        return self.most


def test_memory_for_activations_does_not_grow_with_the_rows() -> None:
    assert Saved().most_of(cached_loss, 64) == Saved().most_of(cached_loss, 12) > 0
    assert Saved().most_of(plain_loss, 64) > 4 * Saved().most_of(plain_loss, 12), "the measure does not see what it should"


@pytest.mark.parametrize(("rows", "chunk"), [(0, 1), (4, 0)])
def test_no_rows_and_empty_chunks_are_refused(rows: int, chunk: int) -> None:
    with pytest.raises(ConfigurationError, match=f"rows={rows}, chunk={chunk}: both must be at least 1"):
        cached_loss(lambda part: inputs()[part], rows, chunk, objective)


def test_an_embedding_function_that_loses_rows_is_refused() -> None:
    """Its chunks would be given one another's gradients."""
    model, x = Toy(), inputs()
    with pytest.raises(ConfigurationError, match=r"embed\(slice\(0, 4\)\) returned 3 rows: one for each is needed"):
        cached_loss(lambda part: model(x[part])[1:], ROWS, 4, objective)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [True, False])
def test_dropout_on_the_gpu_is_replayed(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float64
    model, x = Toy(dtype, "cuda"), inputs(dtype=dtype, device="cuda")
    taken = []
    for take in (plain_loss, cached_loss):
        torch.manual_seed(7)
        with torch.autocast("cuda", dtype=torch.bfloat16) if autocast else nullcontext():
            loss = take(lambda part: model(x[part]), ROWS, 2, objective)
        loss.backward()
        taken.append((loss.item(), gradients(model)))
    assert taken[0][0] == taken[1][0]
    for expected, got in zip(taken[0][1], taken[1][1], strict=True):
        assert (got - expected).norm() < (BFLOAT16 if autocast else 1e-10) * expected.norm()
