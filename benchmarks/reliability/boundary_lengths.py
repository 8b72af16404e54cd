"""Do texts at the edges of what fits hang, lose their end in silence, or change one another?

    python benchmarks/reliability/boundary_lengths.py [--size 3000]

A tiny model whose limits are small, so that all edges are near: every length from 0 to 64 tokens, and up to three around the longest
prompt, the tokens of a prompt pass, those of a batch and those of the queue; alone, in ordered pairs and in triples, through the library
and through the server's engine. Wrong: no answer within 20 seconds, a text that was cut and is not flagged, or the other way round,
another vector than alone, an error that is none of ours.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from campaign import Row, Tally, main, tiny_folder

import doubles
import genembed
from genembed import Budget, ConvergeStop, Embedder, InputError
from genembed.serve.failures import Failure
from genembed.serve.limits import Limits
from genembed.serve.service import Service, Wish

LONGEST, PASS, BATCH, QUEUE = 48, 40, 136, 120
"""Tokens of a prompt, of a pass over prompts, of a batch with its steps, and of the queue."""
SECONDS = 20.0
_TOLERANCE = 1e-5
_RULE = ConvergeStop(0.98, max_steps=8)


def lengths() -> list[int]:
    """Return every length near an edge, in tokens."""
    edges = (LONGEST, PASS, BATCH, QUEUE, BATCH - _RULE.max_steps)
    return sorted({*range(65), *(edge + off for edge in edges for off in range(-3, 4))})


def cases(size: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Yield each length alone, then ordered pairs and triples; some of all where there is no room for every length."""
    known = lengths()
    alone = [(length,) for length in known]
    edges = [length for length in known if any(abs(length - edge) < 4 for edge in (0, LONGEST, PASS, BATCH, QUEUE))]
    pairs = [*itertools.product(edges, repeat=2)]
    triples = [tuple(rng.choice(edges) for _ in range(3)) for _ in range(size)]
    several = [*pairs, *triples]
    yield from rng.sample([*alone, *several], size) if size < len(alone) else (*alone, *rng.sample(several, size - len(alone)))


def text_of(length: int) -> str:
    """Return a text of so many tokens: the tokenizer of the tiny model never joins these letters."""
    return "".join("qzxj"[(length + place) % 4] for place in range(length))


def model(place: Path) -> Embedder:
    """Return a tiny model with narrow limits, in float64."""
    folder = tiny_folder(place)
    settings = doubles.settings_of("qwen2", max_length=LONGEST, halt=_RULE)
    budget = Budget(batch_tokens=BATCH, prefill_tokens=PASS, max_rows=8, pack_weights=False)
    return genembed.load(folder, preset=settings, dtype="float64", budget=budget)


def run(size: int, seed: int) -> Tally:
    """Try so many cases, each through the library, and through the server's engine."""
    tally, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embedder = model(Path(place))
        drawn = [*cases(-(-size // 2), rng)]
        for case in drawn:
            _through_library(embedder, case, tally)
        served = model(Path(place))
        limits = Limits(batch_tokens=3 * (LONGEST + _RULE.max_steps), queue_tokens=QUEUE, steps=_RULE.max_steps, client_batch=3)
        service = Service(served, name="tiny", limits=limits)
        try:
            asyncio.run(_through_service(service, embedder, drawn[: size // 2], tally))
        finally:
            service.close(grace=SECONDS)
    return tally


@cache
def _alone(embedder: Embedder, length: int) -> np.ndarray:
    vector: np.ndarray = embedder.refine([text_of(length)]).vectors[0]
    return vector


def _through_library(embedder: Embedder, case: tuple[int, ...], tally: Tally) -> None:
    kind, texts = f"library, {len(case)} texts", [text_of(length) for length in case]
    assert [len(doubles.tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in texts] == list(case)
    try:
        found = embedder.refine(texts)
    except InputError as error:
        tally.check(0 in case and error.row == case.index(0), kind, f"{case}: {error}")
        return
    right = found.truncated.tolist() == [length > LONGEST for length in case]
    right &= found.tokens.tolist() == [min(length, LONGEST) for length in case]
    apart = max(float(np.abs(vector - _alone(embedder, length)).max()) for vector, length in zip(found.vectors, case, strict=True))
    tally.check(right and 0 not in case and apart < _TOLERANCE, kind, f"{case}: flags {found.truncated}, apart by {apart:.2g}")


async def _through_service(service: Service, reference: Embedder, drawn: list[tuple[int, ...]], tally: Tally) -> None:
    for number, case in enumerate(drawn):
        wish = replace(Wish(), truncate="right" if number % 2 else "error")
        kind, outcome = f"server, {len(case)} texts", ""
        try:
            async with asyncio.timeout(SECONDS):
                found = await service.embed([text_of(length) for length in case], wish)
        except TimeoutError:
            outcome = "hangs"
        except Failure as failure:
            kept = [min(length, LONGEST) for length in case]
            refused = 0 in case or sum(kept) > QUEUE or (wish.truncate == "error" and max(case) > LONGEST)
            outcome = "" if refused and failure.status == 400 else f"{failure.status}: {failure}"
        else:
            if found.truncated != [length > LONGEST for length in case]:
                outcome = f"flags {found.truncated}"
            apart = max(float(np.abs(vector - _alone(reference, length)).max()) for vector, length in zip(found.vectors, case, strict=True))
            outcome = outcome or ("" if apart < _TOLERANCE else f"apart by {apart:.2g}")
        tally.check(not outcome, kind, f"{case}, truncate={wish.truncate}: {outcome}")


ROW = Row(
    name="boundary-lengths",
    property="no length hangs, is cut without a flag, or changes another text",
    size=3_000,
    unit="cases",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
