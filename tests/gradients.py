"""Gradients of a trajectory, and whether two sets of them agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from genembed.backbone import Backbone

FLOAT32_NORMS = 2e-6
"""Transformers takes RMSNorm in float32 even in a float64 model; measured: below 6e-7 of a gradient's norm."""


def gradients_of(backbone: Backbone, trajectory: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, trajectory.numel(), dtype=trajectory.dtype).view_as(trajectory)
    (trajectory * weights).sum().backward()
    modules = [backbone.model] if backbone.trained_head is None else [backbone.model, backbone.trained_head]
    return {name: weight.grad for module in modules for name, weight in module.named_parameters() if weight.grad is not None}


def assert_same_gradients(gradients: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, tolerance: float) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # Some gradients are zero but for rounding, as those of key biases: a softmax does not see them.
        assert float((gradient - expected[name]).norm()) <= tolerance * float(expected[name].norm()) + 1e-10, name
