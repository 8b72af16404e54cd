"""Gathering over two processes: the losses and gradients are those of one process with the joined batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from genembed import ConfigurationError
from genembed.errors import NonFiniteError
from genembed.train.gather import from_first_process, gather_across_processes, leave_group, mean_across_processes
from genembed.train.gradcache import cached_loss
from genembed.train.objective import Objective, Part

WORLD, QUERIES, CANDIDATES, STEPS, WIDTH = 2, 3, 5, 2, 4
"""Rows are those of one process."""

POSITIVES = torch.tensor([4, 0, 2])
"""Of either process's queries, among its own candidates."""

OBJECTIVE = Objective(temperature=0.1)


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, STEPS * WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).view(len(x), STEPS, WIDTH)


def toy() -> Toy:
    torch.manual_seed(3)
    return Toy()


def texts(process: int) -> tuple[Tensor, Tensor]:
    """Return the queries and candidates of one process."""
    generator = torch.Generator().manual_seed(process)
    return tuple(torch.randn(rows, 6, dtype=torch.float64, generator=generator) for rows in (QUERIES, CANDIDATES))


def own_queries(process: int, queries: Tensor, candidates: Tensor) -> Tensor:
    """The loss of this process's queries against the candidates of all, with the regulariser of all queries."""
    positives = POSITIVES + process * CANDIDATES
    return OBJECTIVE(queries, gather_across_processes(candidates), positives=positives, part=Part(1.0, mean_across_processes)).total


def all_queries(process: int, queries: Tensor, candidates: Tensor) -> Tensor:
    """The loss of all queries, which every process computes."""
    positives = gather_across_processes(POSITIVES + process * CANDIDATES)
    return OBJECTIVE(gather_across_processes(queries), gather_across_processes(candidates), positives=positives).total


def gradients(model: torch.nn.Module) -> list[Tensor]:
    taken = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    return taken


def losses_and_gradients(process: int) -> dict[str, Any]:
    """Return what this process has before and after the averaging of DistributedDataParallel."""
    results: dict[str, Any] = {}
    x = torch.cat(texts(process))
    for name, loss in (("own", own_queries), ("all", all_queries)):
        model = toy()
        value = loss(process, *model(x).split([QUERIES, CANDIDATES]))
        value.backward()
        results[name] = value.detach(), gradients(model)

        parallel = DistributedDataParallel(toy())
        value = cached_loss(
            lambda part, model=parallel: model(x[part]),
            len(x),
            3,
            lambda z, loss=loss: loss(process, *z.split([QUERIES, CANDIDATES])),
            no_sync=parallel.no_sync,
        )
        value.backward()
        results[f"{name}, cached"] = value.detach(), gradients(parallel)
    return results


def labels(process: int) -> dict[str, Any]:
    """Return gathered labels, rows of unequal number with their gradient, and what unequal shapes raise."""
    values = {
        "bool": gather_across_processes(torch.tensor([process == 0, True])),
        "int": gather_across_processes(torch.tensor([process, 7])),
        "float": gather_across_processes(torch.tensor([process + 0.5])),
        "transposed": gather_across_processes((torch.arange(6.0).view(2, 3) + 10 * process).T),
    }
    x = torch.full((2 + process, 1), float(process), requires_grad=True)
    uneven = gather_across_processes(x)
    (uneven * torch.arange(1.0, 6.0)[:, None]).sum().backward()
    values |= {"uneven": uneven.detach(), "uneven gradient": x.grad}
    with pytest.raises(ConfigurationError) as steps:
        gather_across_processes(torch.zeros(2, 3 + process, 4))
    return {**values, "steps": str(steps.value)}


def shared(process: int) -> dict[str, Any]:
    """Return what the first process found, who looked for it, and what it raised."""
    looked: list[int] = []

    def compute() -> dict[str, float]:
        looked.append(process)
        return {"quality": process + 0.1}

    def fail() -> None:
        raise NonFiniteError(f"process {process} diverged", row=3)

    found = from_first_process(compute)
    with pytest.raises(NonFiniteError) as error:
        from_first_process(fail)
    return {"found": found, "looked": looked, "error": (str(error.value), error.value.row)}


def work(process: int, folder: Path) -> None:
    """Run in each process, and save what it saw."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    torch.save({**losses_and_gradients(process), **labels(process), **shared(process)}, folder / f"{process}.pt")
    leave_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(folder,), nprocs=WORLD)
    return [torch.load(folder / f"{process}.pt") for process in range(WORLD)]


@pytest.fixture(scope="module")
def joined() -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Loss and gradients of one process with the batches of both."""
    queries, candidates = (torch.cat(parts) for parts in zip(*(texts(process) for process in range(WORLD)), strict=True))
    positives = torch.cat([POSITIVES + process * CANDIDATES for process in range(WORLD)])
    results = {}
    for name in ("own", "all"):
        model = toy()
        q, c = model(queries), model(candidates)
        loss = OBJECTIVE(q, c, positives=positives).total
        loss.backward()
        results[name] = loss.detach(), gradients(model)
    return results


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("cached", ["", ", cached"])
@pytest.mark.parametrize("name", ["own", "all"])
def test_the_mean_of_the_processes_losses_is_the_loss_of_the_joined_batch(
    seen: list[dict[str, Any]], joined: dict[str, Any], name: str, cached: str
) -> None:
    losses = [process[name + cached][0] for process in seen]
    torch.testing.assert_close(mean(losses), joined[name][0], rtol=1e-12, atol=1e-12)
    assert (losses[0] == losses[1]) == (name == "all")


@pytest.mark.parametrize("name", ["own", "all"])
def test_averaged_gradients_are_those_of_the_joined_batch(seen: list[dict[str, Any]], joined: dict[str, Any], name: str) -> None:
    """As DistributedDataParallel averages; no factor of the number of processes is missing or too many."""
    averaged = [mean(list(pair)) for pair in zip(*(process[name][1] for process in seen), strict=True)]
    torch.testing.assert_close(averaged, joined[name][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["own", "all"])
def test_distributed_data_parallel_with_cached_gradients_has_those_of_the_joined_batch(
    seen: list[dict[str, Any]], joined: dict[str, Any], name: str
) -> None:
    for process in seen:
        torch.testing.assert_close(process[f"{name}, cached"][1], joined[name][1], rtol=1e-12, atol=1e-12)


def test_labels_of_any_dtype_are_gathered_in_the_order_of_the_ranks(seen: list[dict[str, Any]]) -> None:
    for process in seen:
        assert process["bool"].tolist() == [True, True, False, True]
        assert process["int"].tolist() == [0, 7, 1, 7]
        assert process["float"].tolist() == [0.5, 1.5]
        assert process["transposed"].tolist() == [[0, 3], [1, 4], [2, 5], [10, 13], [11, 14], [12, 15]]


def test_unequal_shapes_are_refused_on_every_process(seen: list[dict[str, Any]]) -> None:
    """Otherwise the processes would wait for one another until the group's timeout."""
    for process in seen:
        assert process["steps"].startswith("the processes hold shapes (2, 3, 4), (2, 4, 4): give each as many steps")


def test_processes_may_have_different_numbers_of_rows(seen: list[dict[str, Any]]) -> None:
    for process in seen:
        assert process["uneven"].flatten().tolist() == [0, 0, 1, 1, 1]
    # The sum over both processes' losses.
    assert [process["uneven gradient"].flatten().tolist() for process in seen] == [[2, 4], [6, 8, 10]]


def test_all_processes_have_what_the_first_one_found_and_no_other_looks_for_it(seen: list[dict[str, Any]]) -> None:
    """Numbers of their own would let one process stop and leave the others waiting for its gradients."""
    assert [process["found"] for process in seen] == [{"quality": 0.1}] * WORLD
    assert [process["looked"] for process in seen] == [[0], []]


def test_an_error_of_the_first_process_is_raised_on_all(seen: list[dict[str, Any]]) -> None:
    """Otherwise the others would wait until the group's timeout."""
    assert [process["error"] for process in seen] == [("process 0 diverged", 3)] * WORLD


def test_one_process_finds_for_itself() -> None:
    assert from_first_process(lambda: 7) == 7


def test_one_process_gets_its_own_tensor_back() -> None:
    x = torch.zeros(2, 3, 4)
    assert gather_across_processes(x) is x


def test_a_group_of_one_process_gets_its_own_tensor_back(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        x = torch.zeros(2, 3, 4)
        assert gather_across_processes(x) is x
    finally:
        torch.distributed.destroy_process_group()
