"""Does a training run that is killed again and again end as one that was not?

    python benchmarks/reliability/killed_training.py [--size 200]

A tiny model is trained for a few updates, with a checkpoint after every second one. The same run is then killed with SIGKILL at random
moments, also while it writes a checkpoint or the model, and started again with `resume`, until it is done; and all that again until
`--size` kills. Wrong: a run that cannot go on, or ends with other losses or other weights than the unbroken one.
"""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from campaign import Row, Tally, main, tiny_folder

from genembed.source import sha256
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Lora, Recipe
from genembed.train.run import train
from genembed.train.trainer import STAGING

_WORDS = "refine vector claim glucose business trip language model text step stable query document patient"
_FORK = multiprocessing.get_context("fork")
_END_SECONDS = 300.0


def recipe_in(place: Path) -> Recipe:
    """Write pairs and a model, and return the run."""
    rng, path, words = random.Random(0), place / "pairs.jsonl", _WORDS.split()
    with path.open("w") as file:
        for _ in range(60):
            drawn = rng.sample(words, 4)
            file.write(
                json.dumps({"query": " ".join(drawn), "pos": [" ".join(drawn[::-1])], "neg": [" ".join(rng.sample(words, 4))]}) + "\n"
            )
    return Recipe(
        model=str(tiny_folder(place / "model")),
        files=(DataFile(path=str(path)),),
        objective=Objective(temperature=0.1),
        queries=4,
        min_steps=2,
        max_steps=3,
        lora=Lora(rank=4, alpha=8),
        learning_rate=3e-3,
        updates=10,
        save_every=2,
        log_every=1,
    )


def started(recipe: Recipe, output: Path) -> Any:
    """Begin or go on with a run, in a process of its own."""
    process = _FORK.Process(target=_train, args=(recipe, output), daemon=True)
    process.start()
    return process


def _train(recipe: Recipe, output: Path) -> None:
    logging.disable()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # the bars of two hundred runs
        train(recipe, output, resume=True)


def ending(folder: Path) -> dict[str, Any]:
    """Return what a finished run has to have in common with the unbroken one."""
    with (folder / "history.csv").open() as file:
        losses = [row["loss"] for row in csv.DictReader(file) if row.get("loss")]
    return {"losses": losses, "weights": sha256(folder / "adapter_model.safetensors")}


def killed(recipe: Recipe, output: Path, seconds: float, kills: int, rng: random.Random) -> tuple[int, str, int]:
    """Kill a run until it is done or was killed so often; return how often, what was wrong, and how often a checkpoint was half written."""
    done = half_written = 0
    while True:
        process = started(recipe, output)
        process.join(rng.random() * seconds if done < kills else _END_SECONDS)
        if process.exitcode is not None:
            return done, "" if process.exitcode == 0 else f"it ends with {process.exitcode} after {done} kills", half_written
        process.kill()
        process.join()
        if done == kills:
            return done, f"it hangs after {done} kills", half_written
        half_written += any((output / STAGING).glob("*"))  # the folder itself stays
        done += 1


def run(size: int, seed: int) -> Tally:
    """Kill runs so often in all."""
    torch.set_num_threads(1)  # a process with threads of its own could not be forked
    tally, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe = recipe_in(place)
        begin = time.perf_counter()
        whole = started(recipe, place / "whole")
        whole.join(_END_SECONDS)
        seconds, expected = time.perf_counter() - begin, ending(place / "whole")
        left, half_written = size, 0
        while left > 0:
            output = place / f"killed-{tally.tried}"
            kills, wrong, caught = killed(recipe, output, seconds, min(left, 10), rng)
            half_written += caught
            found = ending(output) if not wrong else {}
            wrong = wrong or next((f"other {name}: {found[name]}" for name in expected if found[name] != expected[name]), "")
            tally.check(not wrong, "a run that was killed", wrong)
            left -= kills
    tally.figures |= {"kills": size, "kills_while_a_checkpoint_was_written": half_written}
    tally.measure("seconds_of_the_unbroken_run", seconds)
    return tally


ROW = Row(
    name="killed-training",
    property="a training run that is killed at any moment goes on, and ends with the same losses and weights",
    size=200,
    unit="kills",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
