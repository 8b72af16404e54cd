"""The rows of all processes, so that each process contrasts with every candidate of the joined batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from jaxtyping import Shaped
from torch import Tensor

from genembed.errors import ConfigurationError


def gather_across_processes(x: Shaped[Tensor, "rows *rest"]) -> Shaped[Tensor, "gathered *rest"]:
    """Return the rows of all processes, in the order of their ranks; where there is one process, x itself.

    Row i of process r becomes row r * rows + i, and so must every position among the rows, such as `positives`.

    The gradient of a process's rows is the sum over the losses of all processes. `DistributedDataParallel` then averages the
    weights' gradients over the processes, which gives exactly the gradient of the processes' mean loss:

        1/W sum_p dx_p/dw (sum_r dL_r/dx_p) = d/dw (1/W sum_r L_r)

    No factor of W belongs anywhere, whether each process takes the loss of its own queries or all take the loss of all queries.
    Every process must call this equally often, and every process's loss must use the result: the backward pass communicates too.

    Args:
        x: Trajectories, or labels of any dtype such as positions, scores and masks.

    Raises:
        ConfigurationError: If the shapes on the processes differ.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return x
    shapes = _all_gather(torch.tensor(x.shape, device=x.device)).tolist()
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigurationError(
            f"the processes hold shapes {', '.join(str(tuple(shape)) for shape in shapes)}: give each as many rows and steps, "
            "for example by dropping the last batch and drawing the steps from one seed."
        )
    return _Gather.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def _all_gather(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "world *shape"]:
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x)
    return torch.stack(parts)


class _Gather(torch.autograd.Function):
    """Gather forwards, sum the gradients of all processes backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Concatenate the rows of all processes."""
        # NCCL refuses what is not contiguous.
        return _all_gather(x.contiguous()).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the gradients over the processes and return those of this process's rows."""
        # The reduction works in place, and autograd may need its gradient elsewhere.
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
