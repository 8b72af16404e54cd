"""Linear layers with oneDNN-packed weights: float32 and bfloat16 on CPU, inference only.

Torch's default products leave up to half of the machine unused on some processors (docs/LOG.md has the figures). oneDNN's packed
weights are reached through the operators that Torch's own compiler uses; where they are absent, or do not give what the plain
layer gives, the plain layer stays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

_TYPICAL_ROWS = 128
"""Batch size for which oneDNN chooses the layout of the packed weights."""

Product = Callable[[Tensor], Tensor]


def packable(weight: Tensor) -> bool:
    """Whether a weight can be packed here: float32, or bfloat16 where the processor multiplies it, with oneDNN's operators present."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bfloat16()))
    )


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without them half precision is slower than single."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def packed_product(weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> Product:
    """Return a function equal to `x @ weight.T + bias`, over a packed copy of `weight`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
    plain_bias = None if bias is None else bias.detach()

    def product(inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, packed, plain_bias, "none", [], "")  # type: ignore[no-any-return]

    return product


def pack_linear_layers(model: nn.Module) -> int:
    """Give every linear layer of `model` that can have one a packed copy of its weight, used whenever no gradient is wanted.

    The copies cost as much memory as the weights.

    Returns:
        The number of layers packed; 0 where they are packed already.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and packable(layer.weight)]
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    agreeing = {dtype for dtype in {layer.weight.dtype for layer in layers} if operators_agree(dtype)}
    layers = [layer for layer in layers if layer.weight.dtype in agreeing]
    for layer in layers:
        layer.forward = _forward(layer, packed_product(layer.weight, layer.bias))  # type: ignore[method-assign, assignment]
    return len(layers)


def unpack_linear_layers(model: nn.Module) -> None:
    """Drop the packed copies: before the weights are moved, changed or sent to another process."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            vars(layer).pop("forward", None)


def _forward(layer: nn.Linear, product: Product) -> Product:
    version = layer.weight._version

    def forward(inputs: Tensor) -> Tensor:
        # The packed copy is of no use for gradients, nor once the weight has been changed in place.
        usable = layer.weight._version == version and inputs.dtype == layer.weight.dtype and not torch.is_autocast_enabled("cpu")
        if torch.is_grad_enabled() or not usable:
            return nn.functional.linear(inputs, layer.weight, layer.bias)
        return product(inputs)

    return forward


def operators_agree(dtype: torch.dtype) -> bool:
    """Whether the operators give the right product here; they are not public, so they are tried before they are trusted."""
    inputs, weight, bias = torch.linspace(-1, 1, 96).reshape(3, 32), torch.linspace(-1, 1, 32 * 40).reshape(40, 32).sin(), torch.ones(40)
    inputs, weight, bias = (tensor.to(dtype) for tensor in (inputs, weight, bias))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2  # two roundings of values below 8
    with torch.inference_mode():
        try:
            found, expected = packed_product(weight, bias)(inputs), nn.functional.linear(inputs, weight, bias)
            return found.dtype == dtype and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
        except (RuntimeError, TypeError, AttributeError):
            return False
