"""Linear layers with oneDNN-packed weights: float32 on CPU, inference only.

Torch's default float32 product leaves up to half of the machine unused on some processors (docs/LOG.md has the
figures). oneDNN's packed weights are reached through the operators that Torch's own compiler uses; where they are absent,
or do not give what the plain layer gives, the plain layer stays.
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
    """Whether a weight can be packed here: float32, on CPU, with oneDNN and its operators present."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def packed_product(weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> Product:
    """Return a function equal to `x @ weight.T + bias`, over a packed copy of `weight`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
    plain_bias = None if bias is None else bias.detach()

    def product(inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, packed, plain_bias, "none", [], "")  # type: ignore[no-any-return]

    return product


def pack_linear_layers(model: nn.Module) -> int:
    """Give every float32 linear layer of `model` a packed copy of its weight, used whenever no gradient is wanted.

    The copies cost as much memory as the weights.

    Returns:
        The number of layers packed; 0 where they are packed already.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and packable(layer.weight)]
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    if not layers or not operators_agree():
        return 0
    for layer in layers:
        layer.forward = _forward(layer, packed_product(layer.weight, layer.bias))  # type: ignore[method-assign, assignment]
    return len(layers)


def _forward(layer: nn.Linear, product: Product) -> Product:
    version = layer.weight._version

    def forward(inputs: Tensor) -> Tensor:
        # The packed copy is of no use for gradients, nor once the weight has been changed in place.
        if torch.is_grad_enabled() or layer.weight._version != version or inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(inputs, layer.weight, layer.bias)
        return product(inputs)

    return forward


def operators_agree() -> bool:
    """Whether the operators give the right product here; they are not public, so they are tried before they are trusted."""
    inputs, weight, bias = torch.linspace(-1, 1, 96).reshape(3, 32), torch.linspace(-1, 1, 32 * 40).reshape(40, 32).sin(), torch.ones(40)
    with torch.inference_mode():
        try:
            return torch.allclose(packed_product(weight, bias)(inputs), nn.functional.linear(inputs, weight, bias), rtol=1e-4, atol=1e-4)
        except (RuntimeError, TypeError, AttributeError):
            return False
