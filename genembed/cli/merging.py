"""The shards of a corpus job, as an index takes them: the texts from the job's input, the vectors from its shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genembed.cli.output import with_bar
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    from genembed.halting import ConvergeStop, FixedSteps
    from genembed.index import Passage
    from genembed.index.known import KnownVectors
    from genembed.jobs.folder import Description


def read_shards(root: Path) -> tuple[list[Passage], KnownVectors, Description]:
    """Read a finished job's texts and vectors.

    Raises:
        ConfigurationError: If there is no finished job, its vectors were shortened, or its model is another one now.
    """
    import numpy as np

    from genembed.index import Passage
    from genembed.index.known import KnownVectors
    from genembed.index.passages import beginning_of
    from genembed.jobs.folder import JobFolder
    from genembed.jobs.read import read_embedded

    folder = JobFolder(root)
    description = folder.read_description()
    if description.identity["dims"] is not None:
        raise ConfigurationError(
            f"{root}: holds {description.identity['dims']} dimensions, and a query's vector has all of them; embed the corpus without --dims."
        )
    source, form = _model(root, description)
    parts = list(with_bar(read_embedded(folder), "reading"))
    passages = [
        Passage(row.text, row.id, beginning_of(row.text), row.place.rsplit(", ", 1)[0], "shards") for part in parts for row in part.rows
    ]
    known = KnownVectors(
        source,
        [passage.text for passage in passages],
        form.restore(np.concatenate([part.vectors for part in parts])),
        np.concatenate([part.steps for part in parts]),
        np.concatenate([part.truncated for part in parts]),
    )
    return passages, known, description
