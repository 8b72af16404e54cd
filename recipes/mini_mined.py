"""A third training of `mini` that was measured and not shipped (docs/LOG.md): mined negatives, K up to 20, more updates.

    python recipes/mini_data.py --data ../shared/data --output runs/mini-data
    genembed mine ../shared/data/train/{clapnq_train,covid_qa,...}.jsonl.gz --output runs/mini-data/mined --model mini --steps 0 \
        --negatives 3 --depth 60 --limit 12000 --exclude runs/mini-data/exclude.txt       # the files of MINED
    genembed train --recipe recipes/mini_mined.py --exclude runs/mini-data/exclude.txt --output runs/mini-e0
    python benchmarks/prompt_weight.py runs/mini-e0

Its curve is docs/mini/mined_history.csv.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mini as shipped

from genembed.pooling import Pooling
from genembed.train.pairs import DataFile
from genembed.train.recipe import Recipe

MINED = {
    "clapnq_train",
    "covid_qa",
    "fever_dev_supports",
    "nq_qed_dev",
    "open_trivia",
    "squad_sentence",
    "tldr_commands",
    "wordnet_definitions",
}
"""Files whose rows got hard negatives that the base model finds near to the query."""

SCORED_SHARE = 0.2
"""Share of the batches that come from STS-B's training split; intents keep theirs, the other files share the rest."""


def mini_mined(*files: DataFile) -> Recipe:
    """Return the run; `files` replaces its data."""
    recipe = shipped.mini(*files)
    assert recipe.evaluation is not None
    return replace(
        recipe,
        settings=replace(shipped.SETTINGS, pooling=Pooling(kind="mean", prompt_weight=10.0)),
        files=files or tuple(_changed(file) for file in recipe.files),
        length_limits=(64, 64, 128, 256),
        max_steps=20,
        draw_steps="log_uniform",
        updates=2_400,
        evaluation=replace(recipe.evaluation, every=600),
    )


def _changed(file: DataFile) -> DataFile:
    """Take the mined file where there is one, and give scored pairs their larger share."""
    if file.source == "stsb_train":
        return replace(file, weight=SCORED_SHARE)
    if file.source == "hwu64_train":
        return file
    rest = (1 - SCORED_SHARE - shipped.INTENT_SHARE) / (1 - shipped.SCORED_SHARE - shipped.INTENT_SHARE)
    path = str(Path("runs/mini-data/mined") / f"{file.source}.jsonl") if file.source in MINED else file.path
    return replace(file, path=path, weight=file.weight * rest)
