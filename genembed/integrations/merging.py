"""An adapter that is added to the weights for inference, and taken out again, to the bit, for training."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from genembed.errors import CheckpointError


class MergedAdapter:
    """The adapted layers of a model with the adapter in their weights, and the weights as they were.

    PEFT's own way back subtracts what was added, which leaves rounding behind every time; here the old weights are kept beside the
    new ones, which costs the memory of the adapted layers for as long as they are merged.

    Args:
        adapter: PEFT's model of base and adapter.

    Raises:
        CheckpointError: If this kind of adapter cannot be merged.
    """

    def __init__(self, adapter: Any) -> None:
        self._layers = [layer for layer in adapter.modules() if isinstance(layer, BaseTunerLayer)]
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        for layer in self._layers:
            for weight in layer.get_base_layer().parameters():
                self._before.append((weight, weight.data))
                weight.data = weight.data.clone()
        try:
            # encode() of sentence-transformers is in inference mode, whose tensors could never be trained again.
            with torch.inference_mode(False), torch.no_grad():
                for layer in self._layers:
                    layer.merge()
        except (AttributeError, NotImplementedError, ValueError) as error:
            self.undo()
            raise CheckpointError(f"this kind of adapter cannot be merged into the weights; use LoRA. ({error})") from error

    def undo(self) -> None:
        """Give the layers their own weights back, beside the adapter."""
        for weight, before in self._before:
            weight.data = before
        for layer in self._layers:
            layer.merged_adapters.clear()
