"""Does trouble with one text stay with that text?

    python benchmarks/reliability/fault_isolation.py [--size 400]

The server's engine over a tiny model. In each case some of up to eight texts are poisoned, and what works on a poisoned text at one stage
(its tokens' embeddings, the model's pass, the soft token, a step, the answer) raises an error, gives NaN, runs out of memory, or stalls.
Right: every poisoned text fails (after a stall: none), every other one gets the vector it has alone, and the server is ready again within
two seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaign import Row, Tally, main, tiny_folder

import genembed
from genembed import Budget, Embedder
from genembed.serve.failures import Failure
from genembed.serve.limits import Limits
from genembed.serve.service import Service, Wish

STAGES = ("embed", "forward_packed", "next_embeddings", "step", "finish")
FAULTS = ("error", "memory", "nan", "stall")
_GIVE_NUMBERS = ("embed", "forward_packed", "next_embeddings")
READY_SECONDS, STALL_SECONDS = 2.0, 0.3
_POISON = "zebra "
_SOUND = ("a claim", "a business trip", "glucose in patients", "step by step", "x", "a language model", "stable", "the vector of a text")
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One trial."""

    stage: str
    fault: str
    poisoned: tuple[bool, ...]
    """Of each text of the request."""
    steps: int


def cases(size: int, rng: random.Random) -> Iterator[Case]:
    """Yield every stage with every fault in turn, with other texts each time."""
    kinds = [(stage, fault) for stage in STAGES for fault in FAULTS if fault != "nan" or stage in _GIVE_NUMBERS]
    for _, (stage, fault) in zip(range(size), itertools.cycle(kinds), strict=False):
        count = rng.randint(1, len(_SOUND))
        poisoned = [rng.random() < 0.3 for _ in range(count)]
        poisoned[rng.randrange(count)] = True
        yield Case(stage, fault, tuple(poisoned), rng.randint(1, 5))


class Faults:
    """Goes wrong at one stage, while a poisoned text is among those that are worked on."""

    def __init__(self, service: Service, case: Case) -> None:
        self.live, self.backbone, self.case = service.live, service.embedder.backbone, case
        self.poison = int(service.embedder.tokenizer([_POISON]).ids[0][0])
        self.stalled = False

    def places(self) -> set[int]:
        """Return the poisoned rows under way."""
        return {place for place, ticket in self.live._rows.items() if self.poison in ticket.prompt}

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same work, going wrong."""

        def faulty(*arguments: Any, **options: Any) -> Any:
            bad = self.places()
            if bad and self.case.fault == "error":
                raise RuntimeError("a kernel failed")
            if bad and self.case.fault == "memory":
                raise MemoryError
            if bad and self.case.fault == "stall" and not self.stalled:
                self.stalled = True
                time.sleep(STALL_SECONDS)
            result = work(*arguments, **options)
            return self.spoiled(result, bad) if bad and self.case.fault == "nan" else result

        return faulty

    def spoiled(self, result: Any, bad: set[int]) -> Any:
        """Put NaN where a poisoned text has numbers; where rows cannot be told apart, there is a text by itself, or an error."""
        if not isinstance(result, torch.Tensor):
            return result
        progress = self.live._batch.progress
        if progress is not None and len(progress) == len(result):
            mask = torch.tensor([int(place) in bad for place in progress.index])
            return result.masked_fill(mask.view(-1, *[1] * (result.dim() - 1)), torch.nan)
        if len(self.live._rows) > 1:
            raise RuntimeError("NaN somewhere in a packed pass")
        return torch.full_like(result, torch.nan)

    @contextmanager
    def going_wrong(self) -> Iterator[None]:
        """Patch the stage while the block runs."""
        owner, name = {"step": (self.live._batch, "_advance"), "finish": (self.live._batch, "_finish")}.get(
            self.case.stage, (self.backbone, self.case.stage)
        )
        whole = getattr(type(owner), name)
        setattr(type(owner), name, self.around(whole))  # on the class: a batch that has failed is replaced by a new one
        try:
            yield
        finally:
            setattr(type(owner), name, whole)


async def tried(service: Service, reference: dict[tuple[str, int], np.ndarray], case: Case) -> str:
    """Try one case; return what was wrong, or nothing."""
    texts = [(_POISON if bad else "") + text for bad, text in zip(case.poisoned, _SOUND, strict=False)]
    fails = case.fault != "stall"
    with Faults(service, case).going_wrong():
        async with asyncio.timeout(30):
            found = await asyncio.gather(*(service.embed([text], Wish(steps=case.steps)) for text in texts), return_exceptions=True)
    for text, bad, one in zip(texts, case.poisoned, found, strict=True):
        if bad and fails:
            if not isinstance(one, Failure) or one.status != 500:
                return f"{text!r} did not fail: {one!r:.80}"
        elif isinstance(one, BaseException):
            return f"{text!r} failed: {one!r:.80}"
        elif np.abs(one.vectors[0] - reference[text, case.steps]).max() > _TOLERANCE:
            return f"{text!r} has another vector"
    begin = time.monotonic()
    if not await service.ready() or time.monotonic() - begin > READY_SECONDS:
        return f"ready again after {time.monotonic() - begin:.1f} s, if at all"
    return "" if service.live.under_way == service.live.queued_tokens == 0 else "texts are left"


def run(size: int, seed: int) -> Tally:
    """Try so many cases."""
    tally, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        embedder: Embedder = genembed.load(tiny_folder(Path(place)), dtype="float64", budget=Budget(pack_weights=False))
        texts = [*_SOUND, *(_POISON + text for text in _SOUND)]
        reference = {
            (text, steps): vector for steps in range(1, 6) for text, vector in zip(texts, embedder.encode(texts, steps=steps), strict=True)
        }
        service = Service(embedder, name="tiny", limits=Limits(batch_tokens=4 * 532))
        try:
            for case in cases(size, rng):
                outcome = asyncio.run(tried(service, reference, case))
                tally.check(not outcome, f"{case.fault} at {case.stage}", f"{case}: {outcome}")
        finally:
            service.close(grace=10.0)
    return tally


ROW = Row(
    name="fault-isolation",
    property="a text that fails, gives NaN, runs out of memory or stalls takes no other with it; ready again within 2 s",
    size=400,
    unit="cases",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
