"""One set of texts, clustered under several instructions: does the instruction change what the vectors are about?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Literal

from genembed.embedder import Embedder
from genembed.errors import DataError
from genembed.evaluate.encoder import Encoder
from genembed.evaluate.expansion import Expander
from genembed.evaluate.instructions import Instructions
from genembed.evaluate.local import read_set
from genembed.evaluate.run import Score, evaluate
from genembed.evaluate.tasks import local_task
from genembed.evaluate.two_stage import expanded
from genembed.halting import ConvergeStop, FixedSteps


@dataclass(frozen=True, kw_only=True)
class AspectScores:
    """What each aspect gave."""

    scores: list[Score]
    """V-measure of each aspect's labels under its own instruction, in the order of the aspects."""

    @property
    def harmonic_mean(self) -> float:
        """The score of the set, as InBedder (Peng et al. 2024) and GIRCSE (2025, section 4.1) give it."""
        return harmonic_mean([max(score.score, 0.0) for score in self.scores])


def evaluate_aspects(
    embedder: Embedder,
    path: Path,
    aspects: Mapping[str, str],
    folder: Path,
    *,
    halt: FixedSteps | ConvergeStop | None = None,
    truncate: Literal["right", "error"] = "right",
    expander: Expander | None = None,
    show: Callable[[str], None] = lambda _: None,
) -> AspectScores:
    """Cluster the texts of a file once for each aspect.

    Args:
        embedder: The model.
        path: A `.jsonl[.gz]` file with a text and a column of labels for each aspect.
        aspects: The instruction of each label column.
        folder: Where results are kept, as for `evaluate`.
        halt: When a text is finished; the model's own rule if None.
        truncate: Cut texts that are too long from the right, or refuse them.
        expander: The language model that expands each text under each aspect's instruction; none if None.
        show: Called with the name of each task before it is run.

    Raises:
        DataError: If the file cannot be read as a clustering, or a row has no label of an aspect.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; aspects are label columns of one .jsonl file of texts.")
    tasks = [local_task(read_set(path, kind="clustering", aspect=column)) for column in aspects]
    told = [Instructions(text=text) for text in aspects.values()]
    encoders = [Encoder(embedder, halt=halt, instructions=instructions, truncate=truncate) for instructions in told]
    models = encoders if expander is None else [expanded(encoder, expander, own) for encoder, own in zip(encoders, told, strict=True)]
    scores = [evaluate(model, [task], folder, show=show)[0] for model, task in zip(models, tasks, strict=True)]
    return AspectScores(scores=scores)
