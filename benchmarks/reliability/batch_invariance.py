"""Do a text's vector and its number of steps depend on what it is embedded with?

    python benchmarks/reliability/batch_invariance.py [--size 100000]

Documentation of Python's standard library, embedded by `mini` in float32 on a CPU: each text by itself, and in compositions of 1 to 64
texts in random order, long beside short, some cut at random to make new lengths. `--size` counts pairs of a text and a composition. Wrong:
another number of steps than alone, or a vector that is more than 1e-4 away in one of its dimensions.
"""

from __future__ import annotations

import inspect
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from campaign import Row, Tally, main

import genembed
from genembed import Embedder
from genembed.docstrings import docstrings

TOLERANCE = 1e-4
_COMPOSITIONS = 50
"""Pairs for each text: so much less is to be embedded alone."""
_LARGEST = 64


def texts_of(count: int, rng: random.Random) -> list[str]:
    """Return texts of many lengths, each another."""
    library = Path(sysconfig.get_path("stdlib"))
    found = list({one.text for path in sorted(library.glob("*.py")) for one in docstrings(path.read_bytes(), path.stem)})
    found = [inspect.cleandoc(text) for text in sorted(found)]
    rng.shuffle(found)
    cut = [text[: rng.randint(1, len(text))] for text in found]
    return [text for text in dict.fromkeys((*found[: count // 2], *cut, *found)) if text.strip()][:count]


def compositions(count: int, pairs: int, rng: random.Random) -> list[list[int]]:
    """Draw the texts of each call, at least `pairs` in all."""
    drawn: list[list[int]] = []
    while pairs > 0:
        drawn.append(rng.sample(range(count), min(count, rng.randint(1, _LARGEST))))
        pairs -= len(drawn[-1])
    return drawn


def compare(embedder: Embedder, texts: Sequence[str], drawn: Sequence[Sequence[int]], tally: Tally) -> None:
    """Embed every text alone and in its compositions, and compare."""
    alone = [embedder.refine([text]) for text in texts]
    largest = changed = 0.0
    for rows in drawn:
        together = embedder.refine([texts[row] for row in rows])
        for place, row in enumerate(rows):
            difference = float(np.abs(together.vectors[place] - alone[row].vectors[0]).max())
            steps, own = int(together.steps[place]), int(alone[row].steps[0])
            largest, changed = max(largest, difference if steps == own else 0.0), changed + (steps != own)
            tally.check(
                steps == own and difference <= TOLERANCE,
                "a composition of 1" if len(rows) == 1 else "a composition of several",
                f"text {row} among {len(rows)}: {steps} steps and alone {own}; vectors differ by {difference:.2g}",
            )
    tally.measure("changed_steps", changed)
    tally.measure("largest_difference", largest, at_most=TOLERANCE)
    tally.figures["texts"] = len(texts)


def run(size: int, seed: int) -> Tally:
    """Compare so many pairs."""
    tally, rng = Tally(), random.Random(seed)
    texts = texts_of(max(2, size // _COMPOSITIONS), rng)
    compare(genembed.load("mini", offline=True), texts, compositions(len(texts), size, rng), tally)
    return tally


ROW = Row(
    name="batch-invariance",
    property="a text has the same k* and vector alone and in any batch (float32, CPU, `mini`)",
    size=100_000,
    unit="pairs of a text and a composition",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
