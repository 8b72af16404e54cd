"""All weights in parts over the processes (FSDP2, Zhao et al. 2023): each keeps one part of every weight, its gradient and Adam's state.

Accelerate's own FSDP leaves CPUs out and knows one forward pass an update; refinement makes K + 1 of them through the layers, and
multiplies with the table of embeddings and the head between them. So the layers are parts of their own, gathered whenever one is
called, and all else (table, head, last norm) is one part, gathered for a whole refinement and again for its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from genembed.errors import ConfigurationError


def shard(model: nn.Module, device: str, *, bfloat16: bool) -> None:
    """Cut all weights of a model, in place; afterwards it has to be called as a module, by all processes alike.

    Args:
        model: What is trained; its forward pass must hold every use of its weights.
        device: Kind of the processes' devices, where the parts are kept: cpu, cuda.
        bfloat16: Gather the layers in bfloat16, as mixed precision multiplies them. Their parts and the sums of their gradients are
            float32 all the same.

    Raises:
        ConfigurationError: If the model has no layers that Transformers knows as such.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigurationError("fsdp=True: this model has no layers to be gathered one at a time; train it with fsdp=False.")
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    # The states between the layers stay in float32, as without sharding.
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=half if bfloat16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether the module was cut by `shard`."""
    return isinstance(module, FSDPModule)


def whole(value: Any) -> Any:
    """Join the parts of all tensors in nested dictionaries and lists: on the first process on the CPU, elsewhere they are None.

    Every process must call this. One tensor that stands in several places is joined once, as the table of tied embeddings.
    """
    return _whole(value, {})


def _whole(value: Any, joined: dict[int, Tensor | None]) -> Any:
    if isinstance(value, dict):
        return {key: _whole(inner, joined) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner, joined) for inner in value]
    if not isinstance(value, DTensor):
        return value
    if id(value) not in joined:
        full: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
        joined[id(value)] = full.cpu() if torch.distributed.get_rank() == 0 else None
    return joined[id(value)]


def own_part(whole_tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that every process has in full, cut as `like` is; all of it where that is not cut."""
    if not isinstance(like, DTensor):
        return whole_tensor
    local = whole_tensor.to(like.device)
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


def parts_of_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state, which every process has in full, cut as its weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def cut(index: int, value: Any) -> Any:
        return own_part(value, weights[index]) if isinstance(value, Tensor) and value.shape == weights[index].shape else value

    own = {index: {name: cut(index, value) for name, value in values.items()} for index, values in state["state"].items()}
    return {**state, "state": own}
