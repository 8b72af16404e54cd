"""What processes tell one another: the rows of all, so that each contrasts with every candidate of the joined batch; and what one finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from jaxtyping import Float, Shaped
from torch import Tensor

from genembed.errors import ConfigurationError, GenembedError

Value = TypeVar("Value")


def gather_across_processes(x: Shaped[Tensor, "rows *rest"]) -> Shaped[Tensor, "gathered *rest"]:
    """Return the rows of all processes, in the order of their ranks; where there is one process, x itself.

    The rows of a process come behind those of the processes before it, and so must every position among the rows, such as `positives`.
    Processes may have different numbers of them.

    The gradient of a process's rows is the sum over the losses of all processes. `DistributedDataParallel` then averages the
    weights' gradients over the processes, which gives exactly the gradient of the processes' mean loss:

        1/W sum_p dx_p/dw (sum_r dL_r/dx_p) = d/dw (1/W sum_r L_r)

    No factor of W belongs anywhere, whether each process takes the loss of its own queries or all take the loss of all queries.
    Every process must call this equally often, and every process's loss must use the result: the backward pass communicates too.

    Args:
        x: Trajectories, or labels of any dtype such as positions, scores and masks.

    Raises:
        ConfigurationError: If the shapes on the processes differ in more than their rows.
    """
    if _is_alone():
        return x
    shapes = _all_gather(torch.tensor(x.shape, device=x.device)).tolist()
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise ConfigurationError(
            f"the processes hold shapes {', '.join(str(tuple(shape)) for shape in shapes)}: give each as many steps, "
            "for example by drawing them from one seed."
        )
    counts = [shape[0] for shape in shapes]
    most = max(counts)
    # All bring as many rows as the one that has the most; what was added is taken out again.
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) if len(x) < most else x
    gathered: Tensor = _Gather.apply(padded)  # type: ignore[no-untyped-call]
    if min(counts) == most:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(most), counts, strict=True)])


def mean_across_processes(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the mean over the processes, with its gradient; where there is one process, x itself.

    What is not linear in the step losses, as the regulariser, is that of the joined batch only if it is computed of their mean.
    """
    return x if _is_alone() else gather_across_processes(x[None]).mean(dim=0)


def leave_group() -> None:
    """Take leave of the other processes at the end of a run: one that ends while another talks to it, or with a group open, aborts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process writes for all, as one process does for itself."""
    return _is_alone() or torch.distributed.get_rank() == 0


def from_first_process(compute: Callable[[], Value]) -> Value:
    """Return on every process what the first one computes, while the others wait; one of our errors is raised on all of them.

    What all processes decide by must be one value: sums of floats differ between them, and one that stopped alone would hang the rest.
    Every process must call this equally often.
    """
    if _is_alone():
        return compute()
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [compute()]
        except GenembedError as error:  # raised at once, it would leave the others waiting until the group's timeout
            found = [error]
    torch.distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], GenembedError):
        raise found[0]
    value: Value = found[0]
    return value


def _is_alone() -> bool:
    return not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


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
