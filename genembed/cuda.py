"""The soft token of a few rows on CUDA: one fused kernel, inference only, where it saves memory traffic."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from genembed.errors import GenembedWarning
from genembed.soft_token import Scores, check_temperature, soft_token

MOST_ROWS = 32
"""Rows the kernel is chosen for."""

_MERGED_COLUMNS = 64
_TOLERANCE = 0.02
"""Of an average of entries of size 1, with shares in half precision."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the kernel cuts its work. Nothing in it follows from the number of rows, so that a row's result does not either."""

    entries: int
    """Vocabulary entries in one tile."""
    rows: int = 16
    """Rows a program works on: the least a tensor core multiplies, and the most whose average fits in registers."""
    splits: int = 132
    """Parts of the vocabulary, each for one program: one for each multiprocessor of an H100 or H200."""
    stages: int = 3
    """Tiles in flight, with the one being worked on."""
    warps: int = 8
    """Warps of a program, and chunks of the hidden length."""

    def padded(self, length: int) -> int:
        """Return the hidden length as the kernel computes it."""
        return max(1 << (length - 1).bit_length(), 16 * self.warps)  # a product's inner dimension is at least 16

    def shared_bytes(self, length: int, *, tables: int, element_bytes: int) -> int:
        """Return the shared memory of one program: the rows, the tiles in flight, and the parts of the logits to add up."""
        in_flight = (self.stages - 1) * self.entries * tables
        return element_bytes * self.padded(length) * (self.rows + in_flight) + 4 * self.warps * self.rows * self.entries


def tiling(length: int, *, tables: int, element_bytes: int, shared_bytes: int) -> Tiling | None:
    """Return how to cut the work for a hidden length, or None where it does not fit.

    Args:
        length: Hidden length.
        tables: 1 if input and output embeddings are the same table, otherwise 2.
        element_bytes: Bytes of an element.
        shared_bytes: Shared memory a program may have.
    """
    for entries in (32, 16):
        made = Tiling(entries=entries)
        # The average alone is a float32 for each of rows x length: 2048 are half of the register file, and no more is to be had.
        if made.padded(length) <= 2048 and made.shared_bytes(length, tables=tables, element_bytes=element_bytes) <= shared_bytes:
            return made
    return None


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have; 0 on devices that are not NVIDIA's, for which nothing is tuned."""
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


def fuses(hidden: Float[Tensor, "rows hidden"], weight: Float[Tensor, "vocab hidden"], embeddings: Float[Tensor, "vocab hidden"]) -> bool:
    """Whether the fused kernel is the better way to a soft token.

    It is for few rows, where the time goes into reading the table: the plain products read a tied one twice, the kernel once.
    With more rows the time goes into multiplying, which cuBLAS does better; so it does for other dtypes than the two that
    tensor cores multiply exactly. Long hidden states do not fit into a multiprocessor; see `tiling`.
    """
    return (
        hidden.is_cuda
        and 0 < len(hidden) <= MOST_ROWS
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and hidden.dtype == weight.dtype == embeddings.dtype
        and weight.is_contiguous()
        and embeddings.is_contiguous()
        and _has_triton()
        and _tiling(hidden, weight, embeddings) is not None
        and works(hidden.device, hidden.dtype)
    )


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on a device and gives what the plain products give; tried once, before it is trusted.

    Where it does not, a warning says so and the plain products are used.
    """
    draws = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(size, 128, generator=draws).to(device, dtype) for size in (3, 1_000))
    try:
        found = fused_soft_token(hidden, table, None, table, 1.0, Scores(scale=0.1))[0]
        expected = soft_token((hidden.float() @ table.float().T) * 0.1, table.float())
        wrong = (found - expected).abs().max().item()
        reason = f"it differs from the plain products by {wrong:.2g}" if not wrong <= _TOLERANCE else None
    except Exception as error:  # noqa: BLE001 - a compiler's and a driver's errors are of many kinds, and have no class in common
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason is not None:
        warnings.warn(f"the fused soft token does not work on {device} and is left out ({reason}).", GenembedWarning, stacklevel=2)
    return reason is None


def fused_soft_token(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, "vocab"] | None,
    embeddings: Float[Tensor, "vocab hidden"],
    temperature: float,
    scores: Scores,
    *,
    cut: Tiling | None = None,
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows 1"]]:
    """Compute `soft_token` of a head's logits in one pass over the vocabulary, storing no logits.

    Every split of the vocabulary gives a maximum m_s, a normaliser l_s and an unnormalised average a_s, by the online softmax of
    `blocked_soft_token`; they are merged, in this order whatever the batch, to

        d = sum_s e^(m_s - m) a_s / sum_s e^(m_s - m) l_s,      m = max_s m_s

    Logits are not rounded to the dtype of the weights, as those of a linear layer are. For gradients, in float32 or float64, hand
    this function to `recomputed_soft_token`: it computes logits again with a linear layer, and they must be the same ones.

    Args:
        hidden: What the head multiplies with `weight`.
        weight: Output embeddings W.
        bias: Added to the products.
        embeddings: Input-embedding table E; read only once if it is the same tensor as `weight`.
        temperature: T, dimensionless, > 0.
        scores: What the family does between products and logits.
        cut: How the work is cut.

    Returns:
        The average and the logarithm of the sum of exp(logits / temperature), in at least float32.
    """
    check_temperature(temperature)
    cut = cut or _tiling(hidden, weight, embeddings)
    assert cut is not None, "fuses() says where there is a way to cut the work"
    with torch.cuda.device_of(hidden):
        return _merged(*_split(hidden.detach().contiguous(), weight, bias, embeddings, temperature, scores, cut))


def _split(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, embeddings: Tensor, temperature: float, scores: Scores, cut: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """Return maxima and normalisers [splits, rows] and unnormalised averages [splits, rows, hidden]."""
    import triton.language as tl

    from genembed.triton_soft_token import split_kernel

    rows, length = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    maxima, normalisers = (hidden.new_empty(cut.splits, rows, dtype=wide) for _ in range(2))
    averages = hidden.new_empty(cut.splits, rows, length, dtype=wide)
    split_kernel[-(-rows // cut.rows), cut.splits](
        hidden,
        weight.detach(),
        None if bias is None else bias.detach(),
        embeddings.detach(),
        maxima,
        normalisers,
        averages,
        rows,
        len(weight),
        length=length,
        chunks=cut.warps,
        chunk=cut.padded(length) // cut.warps,
        block=cut.rows,
        entries=cut.entries,
        splits=cut.splits,
        stages=cut.stages,
        tied=_tables(weight, embeddings) == 1,
        temperature=temperature,
        scale=scores.scale,
        softcap=scores.softcap,
        wide=tl.float64 if wide == torch.float64 else tl.float32,
        num_warps=cut.warps,
    )
    return maxima, normalisers, averages


def _merged(maxima: Tensor, normalisers: Tensor, averages: Tensor) -> tuple[Tensor, Tensor]:
    """Return the average and the log-normaliser."""
    from genembed.triton_soft_token import merge_kernel

    splits, rows, length = averages.shape
    average, log_normaliser = averages.new_empty(rows, length), averages.new_empty(rows, 1)
    merge_kernel[rows, -(-length // _MERGED_COLUMNS)](
        maxima,
        normalisers,
        averages,
        average,
        log_normaliser,
        rows,
        length=length,
        columns=_MERGED_COLUMNS,
        splits=splits,
        padded=1 << (splits - 1).bit_length(),
    )
    return average, log_normaliser


def _tables(weight: Tensor, embeddings: Tensor) -> int:
    return 1 if weight.data_ptr() == embeddings.data_ptr() else 2


def _tiling(hidden: Tensor, weight: Tensor, embeddings: Tensor) -> Tiling | None:
    return tiling(
        hidden.shape[1],
        tables=_tables(weight, embeddings),
        element_bytes=weight.element_size(),
        shared_bytes=shared_memory(hidden.device),
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
