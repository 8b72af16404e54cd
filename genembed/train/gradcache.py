"""Losses over more rows than fit into memory: embed without gradient, then again chunk by chunk with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.errors import ConfigurationError

Embed = Callable[[slice], Tensor]
"""From consecutive rows of the batch to their trajectories."""


def cached_loss(
    embed: Embed,
    rows: int,
    chunk: int,
    loss: Callable[[Tensor], Tensor],
    *,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    chunks: int = 1,
) -> Float[Tensor, ""]:
    """Return the loss of all rows, whose backward pass embeds one chunk at a time.

        dL/dw = sum_i dL/dz_i dz_i/dw                                             (GradCache, Gao et al. 2021, section 3)

    The trajectories z are computed without gradient and the loss over them with it. When the backward pass reaches z, each chunk
    is embedded once more and takes its rows of dL/dz. The memory for activations is that of one chunk; the price is a second
    forward pass, which is saved where one chunk holds all rows. A factor on the loss, as of a gradient scaler, and parameters of
    the loss itself need no care. Under `torch.no_grad()` the loss is the plain value. The gradient reaches the weights by
    `backward()` alone, not by `torch.autograd.grad`.

    Both passes over a chunk draw the same random numbers, on the CPU and on every CUDA device, and run under the autocast of this
    call. Everything else that `embed` depends on must be as it was until the backward pass is done.

    Args:
        embed: Returns the trajectories of the given rows, [rows of the slice, steps, hidden].
        rows: Number of rows of the batch, all texts of it.
        chunk: Most rows to embed at once with gradient, >= 1.
        loss: Returns the loss, a scalar, of the trajectories of all rows in their order.
        no_sync: Entered for all chunks but the last, so that gradients travel between processes once: that of
            `DistributedDataParallel`.
        chunks: Least number of chunks, 1 to `rows`, where processes must do alike.

    Raises:
        ConfigurationError: If `rows` or `chunk` is below 1, `chunks` is not in its range, or `embed` does not return a trajectory for
            each row.
    """
    if rows < 1 or chunk < 1:
        raise ConfigurationError(f"rows={rows}, chunk={chunk}: both must be at least 1.")
    if not 1 <= chunks <= rows:
        raise ConfigurationError(f"{rows} texts cannot be cut into {chunks} chunks, as many as another process has; use a larger chunk.")
    parts = _parts(rows, chunk, chunks)
    if len(parts) == 1:
        return loss(_embedded(embed, parts[0]))
    trajectories, randomness = _embed_all(embed, parts)
    device = trajectories.device.type
    autocast = partial(
        torch.autocast,
        device,
        enabled=torch.is_autocast_enabled(device),
        dtype=torch.get_autocast_dtype(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )

    def replay(gradient: Tensor) -> None:
        with torch.random.fork_rng(devices=range(len(randomness[0].cuda)), device_type="cuda"):
            for part, state in zip(parts, randomness, strict=True):
                state.restore()
                with no_sync() if part is not parts[-1] else nullcontext():
                    _embed_again(embed, part, gradient[part], autocast())

    trajectories.requires_grad_(True).register_hook(replay)
    return loss(trajectories)


def _parts(rows: int, chunk: int, chunks: int) -> list[slice]:
    """Cut the rows into chunks of the given size, or where these are too few into equal ones."""
    if math.ceil(rows / chunk) >= chunks:
        return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
    return [slice(rows * place // chunks, rows * (place + 1) // chunks) for place in range(chunks)]


@dataclass(frozen=True, eq=False)
class _Randomness:
    """States of the random generators."""

    cpu: Tensor
    cuda: list[Tensor]
    """One for each device; none where CUDA is not in use."""

    @classmethod
    def now(cls) -> _Randomness:
        """Remember the present states."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])

    def restore(self) -> None:
        """Go back to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def _embedded(embed: Embed, part: slice) -> Tensor:
    trajectories = embed(part)
    if len(trajectories) != part.stop - part.start:
        raise ConfigurationError(f"embed(slice({part.start}, {part.stop})) returned {len(trajectories)} rows: one for each is needed.")
    return trajectories


@torch.no_grad()
def _embed_all(embed: Embed, parts: list[slice]) -> tuple[Tensor, list[_Randomness]]:
    """Embed all rows without gradient, and remember where each chunk found the random generators."""
    chunks, randomness = [], []
    for part in parts:
        randomness.append(_Randomness.now())
        chunks.append(_embedded(embed, part))
    return torch.cat(chunks), randomness


def _embed_again(embed: Embed, part: slice, gradient: Tensor, autocast: torch.autocast) -> None:
    with torch.enable_grad(), autocast:
        trajectories = _embedded(embed, part)
    trajectories.backward(gradient)
