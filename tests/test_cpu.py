"""Linear layers with packed weights: equal to the plain ones, or not used."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import doubles
from genembed import Embedder, cpu, load
from genembed.budget import Budget
from genembed.engine import Engine

LAYER = nn.Linear(48, 40)
needs_packing = pytest.mark.skipif(not cpu.packable(LAYER.weight), reason="this Torch has no oneDNN packing")


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40, bias=False)).requires_grad_(False)


@pytest.fixture
def broken_product(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., torch.Tensor]], None]:
    """Replace Torch's private operators by ones that misbehave."""

    def replace(product: Callable[..., torch.Tensor]) -> None:
        operators = types.SimpleNamespace(_reorder_linear_weight=lambda weight, rows: weight, _linear_pointwise=product)
        monkeypatch.setattr(torch.ops, "mkldnn", operators)

    return replace


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 128, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_the_packed_product_equals_the_linear_layer(rows: int, bias: bool) -> None:
    layer = nn.Linear(96, 56, bias=bias)
    inputs = torch.randn(rows, 96)
    with torch.inference_mode():
        torch.testing.assert_close(cpu.packed_product(layer.weight, layer.bias)(inputs), layer(inputs), rtol=1e-5, atol=1e-5)


@needs_packing
def test_every_linear_layer_of_a_model_is_packed_and_gives_what_it_gave() -> None:
    model, inputs = small_model(), torch.randn(2, 5, 48)
    with torch.inference_mode():
        before = model(inputs)
        assert cpu.pack_linear_layers(model) == 2
        torch.testing.assert_close(model(inputs), before, rtol=1e-5, atol=1e-5)


@needs_packing
def test_gradients_still_flow_through_a_packed_layer() -> None:
    model = small_model().requires_grad_(True)
    inputs = torch.randn(3, 48)
    model(inputs).sum().backward()
    expected = model[0].weight.grad.clone()
    cpu.pack_linear_layers(model)
    model.zero_grad()
    model(inputs).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_not_packed(dtype: torch.dtype) -> None:
    assert not cpu.packable(LAYER.weight.to(dtype))
    assert cpu.pack_linear_layers(small_model().to(dtype)) == 0


def test_bfloat16_is_packed_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    assert not cpu.packable(LAYER.weight.bfloat16())
    assert cpu.pack_linear_layers(small_model().bfloat16()) == 0


@needs_packing
@pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="this processor has no products of bfloat16")
@pytest.mark.parametrize("rows", [1, 3, 128])
def test_a_packed_product_of_bfloat16_is_as_close_to_the_exact_one_as_the_plain_layer(rows: int) -> None:
    model, inputs = small_model(), torch.randn(rows, 48)
    with torch.inference_mode():
        exact, half = model.double()(inputs.double()), model.bfloat16()
        plain = (half(inputs.bfloat16()) - exact).abs().max()
        assert cpu.pack_linear_layers(half) == 2
        found = half(inputs.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 1.5 * plain


@needs_packing
@pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="this processor has no products of bfloat16")
def test_packed_bfloat16_is_as_close_to_float64_as_plain_bfloat16(
    folder_of: Callable[..., Any], embedder_of: Callable[..., Embedder]
) -> None:
    texts = ["What is a business trip?", "x", "A language model refines the vector of a text."]
    exact, folder = embedder_of("qwen2").encode(texts, steps=2), folder_of("qwen2")
    packed, plain = (load(folder, dtype="bfloat16", budget=Budget(pack_weights=pack)) for pack in (True, False))
    assert packed.backbone._vocabulary_is_packed
    assert not plain.backbone._vocabulary_is_packed
    errors = [np.abs(one.encode(texts, steps=2) - exact).max() for one in (packed, plain)]
    assert errors[0] <= 2 * errors[1]


def wrong(*_: Any) -> torch.Tensor:
    return torch.zeros(3, 64)


def raising(*_: Any) -> torch.Tensor:
    raise RuntimeError("the operator has another signature now")


@pytest.mark.parametrize("product", [wrong, raising])
def test_an_operator_that_does_not_agree_is_not_used(broken_product: Callable[..., None], product: Callable[..., torch.Tensor]) -> None:
    """The operators are private to Torch: a version may change what they do, or their signature."""
    model, inputs = small_model(), torch.randn(3, 48)
    with torch.inference_mode():
        before = model(inputs)
        broken_product(product)
        assert cpu.pack_linear_layers(model) == 0
        assert torch.equal(model(inputs), before)


def test_an_operator_that_does_not_agree_is_not_used_for_soft_tokens_either(
    broken_product: Callable[..., None], folder_of: Callable[..., Any]
) -> None:
    """The soft token has packed products of its own, beside those of the linear layers."""
    expected = load(folder_of("qwen2"), dtype="float64").encode(["x y z"], steps=3)
    broken_product(lambda inputs, weight, *_: torch.zeros(*inputs.shape[:-1], len(weight)))
    np.testing.assert_allclose(load(folder_of("qwen2"), dtype="float32").encode(["x y z"], steps=3), expected, atol=1e-3)


@needs_packing
def test_packed_float32_gives_the_vectors_of_float64(folder_of: Callable[..., Any], embedder_of: Callable[..., Embedder]) -> None:
    texts = ["What is a business trip?", "x", "A language model refines the vector of a text."]
    packed = load(folder_of("qwen2"), dtype="float32")
    np.testing.assert_allclose(packed.encode(texts, steps=2), embedder_of("qwen2").encode(texts, steps=2), atol=1e-3)


@needs_packing
def test_packing_twice_changes_nothing() -> None:
    """Every engine over a backbone packs it."""
    backbone = doubles.backbone("llama")
    model = doubles.trainable(backbone)
    model.model.float().requires_grad_(False)
    prompts = doubles.prompts([5, 3])
    first, second = Engine(model), Engine(model)
    from genembed import FixedSteps

    before = [refined.vectors.tolist() for refined in first.run(prompts, FixedSteps(2))]
    assert [refined.vectors.tolist() for refined in second.run(prompts, FixedSteps(2))] == before


@needs_packing
def test_unpacking_gives_the_plain_layers_back_and_leaves_other_forwards_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    own = model[1].forward = lambda inputs: inputs
    assert cpu.pack_linear_layers(model) == 1
    cpu.unpack_linear_layers(model)
    assert "forward" not in vars(model[0])
    assert model[1].forward is own
    assert cpu.pack_linear_layers(model) == 1


def test_a_weight_that_is_changed_in_place_is_seen() -> None:
    """The packed copy would go on with the old one."""
    model, inputs = small_model(), torch.randn(3, 48)
    cpu.pack_linear_layers(model)
    with torch.no_grad():
        model[0].weight.zero_()
        torch.testing.assert_close(model(inputs), model[2](torch.nn.functional.gelu(model[0].bias)).expand(3, -1))
