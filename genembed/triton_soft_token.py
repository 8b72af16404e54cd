"""The fused soft token as two Triton kernels: one pass over a split of the vocabulary, and the merge of the splits.

Layout: the hidden length is cut into as many chunks as there are warps, and every product is batched over the chunks. A warp
then owns one chunk of everything, its part of the average stays in its registers from the first vocabulary entry to the last,
and warps meet only to add up their parts of the logits. Embeddings are multiplied from the right in one product and from the
left in the other, so that both read the same tile in shared memory: of a tied table every entry is fetched once.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])  # one compiled kernel, and so one order of sums, for any batch
@no_type_check
def split_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    embeddings: tl.tensor,
    maxima: tl.tensor,
    normalisers: tl.tensor,
    averages: tl.tensor,
    rows: tl.tensor,
    vocabulary: tl.tensor,
    length: tl.constexpr,
    chunks: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    entries: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
    tied: tl.constexpr,
    temperature: tl.constexpr,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """Write maximum, normaliser and unnormalised average over one split of the vocabulary, for one block of rows.

    `length` is the hidden length, `block` the rows and `entries` the vocabulary entries in one tile.
    """
    split = tl.program_id(1)
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.arange(0, chunks)[:, None] * chunk + tl.arange(0, chunk)[None, :]
    within, present = column < length, row < rows
    queries = tl.load(
        hidden + row[None, None, :] * length + column[:, :, None], mask=within[:, :, None] & present[None, None, :], other=0.0
    )
    maximum = tl.full([block], float("-inf"), wide)
    normaliser = tl.zeros([block], wide)
    average = tl.zeros([chunks, block, chunk], wide)
    place = tl.arange(0, entries)[None, :, None] * length + column[:, None, :]
    tiles = tl.cdiv(vocabulary, entries)
    for tile in tl.range(split * tiles // splits, (split + 1) * tiles // splits, num_stages=stages):
        start = tl.cast(tile, tl.int64) * entries  # the table may have more than 2^31 elements
        entry = start + tl.arange(0, entries)
        inside = entry < vocabulary
        filled = inside[None, :, None] & within[:, None, :]
        keys = tl.load(weight + start * length + place, mask=filled, other=0.0)
        values = keys if tied else tl.load(embeddings + start * length + place, mask=filled, other=0.0)
        logits = tl.sum(tl.dot(keys, queries, input_precision="ieee", out_dtype=wide), 0)
        if bias is not None:
            logits += tl.load(bias + entry, mask=inside, other=0.0).to(wide)[:, None]
        logits = finished(logits, scale, softcap) / temperature
        logits = tl.where(inside[:, None], logits, float("-inf"))
        top = tl.maximum(maximum, tl.max(logits, 0))
        shares = tl.exp(logits - top[None, :])
        shrink = tl.exp(maximum - top)
        normaliser = normaliser * shrink + tl.sum(shares, 0)
        spread = tl.broadcast_to(tl.trans(shares.to(values.dtype))[None], [chunks, block, entries])
        average = tl.dot(spread, values, average * shrink[None, :, None], input_precision="ieee", out_dtype=wide)
        maximum = top
    line = split * rows + row
    tl.store(maxima + line, maximum, mask=present)
    tl.store(normalisers + line, normaliser, mask=present)
    tl.store(averages + line[None, :, None] * length + column[:, None, :], average, mask=within[:, None, :] & present[None, :, None])


@triton.jit
@no_type_check
def finished(products: tl.tensor, scale: tl.constexpr, softcap: tl.constexpr) -> tl.tensor:
    """Return softcap tanh(scale products / softcap), with a tanh whose exponential cannot overflow; Triton itself has none."""
    logits = products * scale
    if softcap is not None:
        shrunk = tl.exp(tl.abs(logits) * (-2 / softcap))
        tanh = (1 - shrunk) / (1 + shrunk)
        logits = tl.where(logits < 0, -tanh, tanh) * softcap
    return logits


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def merge_kernel(
    maxima: tl.tensor,
    normalisers: tl.tensor,
    averages: tl.tensor,
    average: tl.tensor,
    log_normaliser: tl.tensor,
    rows: tl.tensor,
    length: tl.constexpr,
    columns: tl.constexpr,
    splits: tl.constexpr,
    padded: tl.constexpr,
) -> None:
    """Merge the splits of one row, for `columns` of its elements; `padded` is the power of two from `splits` on."""
    row = tl.program_id(0)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    split = tl.arange(0, padded)
    line, present = split * rows + row, split < splits
    maximum = tl.load(maxima + line, mask=present, other=float("-inf"))
    top = tl.max(maximum, 0)
    shares = tl.exp(maximum - top)
    normaliser = tl.sum(shares * tl.load(normalisers + line, mask=present, other=0.0), 0)
    part = tl.load(averages + line[:, None] * length + column[None, :], mask=present[:, None] & (column < length)[None, :], other=0.0)
    tl.store(average + row * length + column, tl.sum(part * shares[:, None], 0) / normaliser, mask=column < length)
    tl.store(log_normaliser + row, top + tl.log(normaliser))
