"""Law 2: a row alone is the row in a padded batch, and a compacted batch is the uncompacted one."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import doubles
from genembed import ConfigurationError
from genembed.packed import PackedRows
from genembed.refine import refine
from genembed.rows import CachedRows
from genembed.tokens import TokenBatch

PROMPTS = doubles.prompts([5, 17, 1, 9, 12])


WINDOWED = ("mistral-window", "gemma2", "gemma3")


@pytest.mark.parametrize(
    ("family", "side"),
    [(family, side) for family in doubles.FAMILIES for side in ("left", "right") if side == "left" or family not in WINDOWED],
)
@pytest.mark.parametrize("cached", [True, False])
def test_a_row_alone_equals_the_row_in_a_padded_batch(family: str, side: Literal["left", "right"], cached: bool) -> None:
    backbone = doubles.backbone(family)
    with torch.no_grad():
        together = refine(backbone, TokenBatch.pad(PROMPTS, side=side), steps=4, cached=cached)
    for row, ids in enumerate(PROMPTS):
        torch.testing.assert_close(together[row], doubles.alone(backbone, ids, 4)[1:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("cached", [True, False])
def test_padding_on_the_right_is_refused_under_a_sliding_window(family: str, cached: bool) -> None:
    """Transformers' window counts places of the cache, so padding after a prompt would push the prompt out of it."""
    with pytest.raises(
        ConfigurationError, match=r"padding_side='right' with .*: its sliding window would count the padding; pad on the left"
    ):
        refine(doubles.backbone(family), TokenBatch.pad(PROMPTS, side="right"), steps=1, cached=cached)


@given(keep=st.permutations(range(5)).flatmap(lambda order: st.integers(1, 5).map(lambda count: order[:count])), before=st.integers(0, 3))
@examples(max_examples=15)
@pytest.mark.parametrize("family", ["qwen2", "mistral-window", "bert"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_a_compacted_batch_equals_the_uncompacted_one(family: str, kind: str, keep: list[int], before: int) -> None:
    backbone = doubles.backbone(family)
    batch = TokenBatch.pad(PROMPTS)
    with torch.inference_mode():
        whole = CachedRows(backbone, batch)
        rows: CachedRows | PackedRows = CachedRows(backbone, batch)
        if kind == "packed":
            rows = PackedRows(backbone, max_rows=5, max_tokens=17 + before + 3)
            rows.admit(PROMPTS)
        for step in range(before + 3):
            if step == before:
                rows.select(torch.tensor(keep))
            kept = torch.tensor(keep if step >= before else range(5))
            whole.append(backbone.next_embeddings(whole.last_hidden))
            rows.append(backbone.next_embeddings(rows.last_hidden))
            torch.testing.assert_close(rows.last_hidden, whole.last_hidden[kept], rtol=0, atol=1e-10)
