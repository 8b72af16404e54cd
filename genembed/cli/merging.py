"""The shards of a corpus job, as an index takes them: the texts from the job's input, the vectors from its shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from genembed.cli.output import with_bar
from genembed.errors import ConfigurationError

if TYPE_CHECKING:
    from genembed.index import Passage
    from genembed.index.known import KnownVectors
    from genembed.jobs.folder import Description
    from genembed.settings import ModelSettings
    from genembed.source import Source


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
    from genembed.precision import form_of
    from genembed.source import ranges_of

    folder = JobFolder(root)
    description = folder.read_description()
    if description.identity["dims"] is not None:
        raise ConfigurationError(
            f"{root}: holds {description.identity['dims']} dimensions, and a query has all of them; embed the corpus without --dims."
        )
    source = _source(root, description)
    parts = list(with_bar(read_embedded(folder), "reading"))
    vectors = np.concatenate([part.vectors for part in parts])
    form = form_of(
        description.identity["dtype"], None, hidden=vectors.shape[1], trained=source.settings.matryoshka_dims, ranges=ranges_of(source)
    )
    passages = [
        Passage(row.text, row.id, beginning_of(row.text), row.place.rsplit(", ", 1)[0], "shards") for part in parts for row in part.rows
    ]
    known = KnownVectors(
        source,
        [passage.text for passage in passages],
        form.restore(vectors),
        np.concatenate([part.steps for part in parts]),
        np.concatenate([part.truncated for part in parts]),
    )
    return passages, known, description


@dataclass(frozen=True)
class _Found:
    """A model whose files are known, and not loaded."""

    source: Source
    settings: ModelSettings


def _source(root: Path, description: Description) -> Source:
    """Find the job's model, and make sure that it is the one that made the vectors."""
    from genembed.fingerprint import fingerprint
    from genembed.settings import ModelSettings
    from genembed.source import resolve

    names = description.origin
    preset = names["preset"]
    if isinstance(preset, dict):
        preset = ModelSettings.from_json(preset, source=str(root))
    source = resolve(names["model"], adapter=names["adapter"], preset=preset, offline=True)
    if fingerprint(_Found(source, source.settings)) != description.identity["model"]:
        raise ConfigurationError(
            f"{root}: the model {names['model']} has changed since the job; its queries would not compare with these vectors."
        )
    return source
