"""A searchable folder of texts and vectors: a LanceDB table, and a note of the model that made it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from genembed.embedder import Embedder, Refinement
from genembed.errors import CheckpointError, ConfigurationError, TextError, missing_extra
from genembed.files import replacing, replacing_folder
from genembed.halting import HaltingRule
from genembed.index.passages import Passage, docstring_passage, read_passages
from genembed.settings import ModelSettings
from genembed.source import BUILTIN, Source

try:
    import lancedb
    import pyarrow
except ModuleNotFoundError as missing:
    raise missing_extra("index", missing.name or "lancedb") from missing

__all__ = ["Description", "Hit", "Index", "Passage", "docstring_passage", "fingerprint", "passages_hash", "read_passages"]

DESCRIPTION_FILE = "genembed-index.json"
FORMAT_VERSION = 1
"""Version of the description file; a reader refuses another one."""

_TABLE = "passages"
_SAMPLE_BYTES = 1 << 20
"""Bytes at either end of a weight file that its fingerprint reads: training changes every part of a file, and a base model
may be too large to be read whole for each search."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the index folder says about itself."""

    model: str
    """Name, folder or hub id of the model."""
    dimensions: int
    halt: str
    """Halting rule of the texts; queries may use another."""
    instruction: str | None
    """Instruction the texts were embedded under."""
    fingerprint: str
    """Hash of the model's settings and weights, see `fingerprint`."""
    passages: str
    """Hash of references and texts, see `passages_hash`."""
    rows: int
    steps: float
    """Refinement steps done for a text, mean; 0 if there is no text."""
    seconds: float
    """Time the embedding took."""
    adapter: str | None = None
    """Folder or hub id of the adapter that was named beside the model, if any."""
    preset: str | dict[str, Any] | None = None
    """What was given instead of the model's own settings: a preset's name, or settings as in a settings file."""

    @property
    def model_settings(self) -> str | ModelSettings | None:
        """The preset as `genembed.load` takes it; None where the model's own settings hold."""
        return ModelSettings.from_json(self.preset, source=DESCRIPTION_FILE) if isinstance(self.preset, dict) else self.preset


@dataclass(frozen=True)
class Hit:
    """A text that was found."""

    score: float
    """Cosine with the query."""
    reference: str
    summary: str
    text: str


class Index:
    """A folder of embedded texts. Made by `Index.build` or `Index.open`."""

    def __init__(self, folder: Path, description: Description, table: Any) -> None:
        self.folder = folder
        self.description = description
        self._table = table

    def __len__(self) -> int:
        """Return the number of texts."""
        return self.description.rows

    @classmethod
    def build(
        cls,
        folder: str | Path,
        embedder: Embedder,
        passages: Sequence[Passage],
        *,
        instruction: str | None = None,
        halt: HaltingRule | None = None,
        truncate: Literal["right", "error"] = "right",
        overwrite: bool = False,
        show_progress_bar: bool = False,
    ) -> Index:
        """Embed texts as documents and store them in a new folder, which appears only when it is complete.

        Args:
            folder: Where the index goes; the folder above it must exist.
            embedder: The model; searching needs the same one.
            passages: The texts.
            instruction: What the vectors are for; the model's own one for documents if None.
            halt: When a text is finished; the model's own rule if None.
            truncate: Cut texts that are too long from the right, or refuse them (`error`).
            overwrite: Replace the index that is there.
            show_progress_bar: Show a bar on stderr when the work takes more than a second.

        Raises:
            ConfigurationError: If the folder is taken or cannot be written.
            InputError: If a text cannot be embedded; the message has its row.
        """
        settings = embedder.settings
        instruction = settings.document_instruction if instruction is None else instruction
        check_target(Path(folder), overwrite=overwrite)
        with replacing_folder(Path(folder)) as temporary:
            begin = time.perf_counter()
            texts = [passage.text for passage in passages]
            with _naming(passages):
                refinement = embedder.refine(
                    texts, instruction=instruction, halt=halt, truncate=truncate, show_progress_bar=show_progress_bar
                )
            description = Description(
                dimensions=embedder.get_embedding_dimension(),
                halt=repr(settings.halt if halt is None else halt),
                instruction=instruction,
                fingerprint=fingerprint(embedder),
                passages=passages_hash(passages),
                rows=len(texts),
                steps=float(refinement.steps.mean()) if texts else 0.0,
                seconds=time.perf_counter() - begin,
                **_origin(embedder.source),
            )
            _connect(temporary).create_table(_TABLE, data=_table(passages, refinement))
            with replacing(temporary / DESCRIPTION_FILE) as file:
                file.write(
                    json.dumps({"format_version": FORMAT_VERSION, **asdict(description)}, indent=2, ensure_ascii=False).encode() + b"\n"
                )
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open the index in a folder.

        Raises:
            ConfigurationError: If there is none, or a newer genembed made it.
            CheckpointError: If its files do not belong together.
        """
        folder = Path(folder)
        description = _read_description(folder)
        try:
            table = _connect(folder).open_table(_TABLE)
            rows = table.count_rows()
        except (OSError, ValueError, RuntimeError) as error:
            raise _damaged(folder, error) from error
        if rows != description.rows:
            raise _damaged(folder, f"{DESCRIPTION_FILE} says {description.rows} rows, and there are {rows}")
        return cls(folder, description, table)

    def check(self, embedder: Embedder) -> None:
        """Refuse a model other than the one that made the index.

        Raises:
            ConfigurationError: With both names and the way out.
        """
        if fingerprint(embedder) != self.description.fingerprint:
            other = f"{_absolute(embedder.source.name)!r} ({embedder.get_embedding_dimension()} dimensions)"
            raise ConfigurationError(
                f"{self.folder}: made by the model {self.description.model!r} ({self.description.dimensions} dimensions); those of "
                f"{other}, as its weights and settings are now, do not compare with its own: search with the model that made it, or "
                "build the index again with --overwrite."
            )

    def search(self, vector: Float[np.ndarray, "hidden"], *, k: int = 10) -> list[Hit]:
        """Return the `k` texts whose vectors have the highest cosine with a query's, best first; every vector is compared.

        Raises:
            ConfigurationError: If `k` is not positive or the vector has another length.
        """
        if k < 1:
            raise ConfigurationError(f"k={k}: at least one hit has to be asked for.")
        if vector.shape != (self.description.dimensions,):
            raise ConfigurationError(
                f"a query vector of shape {vector.shape} does not compare with {self.description.dimensions} dimensions; use the model "
                f"that made the index: {self.description.model}."
            )
        columns = ["reference", "summary", "text", "_distance"]
        try:
            found = self._table.search(vector.astype(np.float32)).distance_type("cosine").limit(k).select(columns).to_list()
        except (OSError, RuntimeError) as error:
            raise _damaged(self.folder, error) from error
        return [Hit(1.0 - float(row["_distance"]), row["reference"], row["summary"], row["text"]) for row in found]


def fingerprint(embedder: Embedder) -> str:
    """Hash what decides a model's vectors: samples of its weight files, and its settings without those that only bring them closer."""
    free = ("halt", "query_instruction", "parallel_passes")
    settings = {name: value for name, value in embedder.settings.to_json().items() if name not in free}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    source = embedder.source
    folders = [folder for folder in (source.base, source.adapter) if folder is not None]
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    for path in dict.fromkeys([*files, *([source.head] if source.head is not None else [])]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(size - _SAMPLE_BYTES, 0))
            digest.update(file.read())
    return digest.hexdigest()


def passages_hash(passages: Sequence[Passage]) -> str:
    """Hash references and texts, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps([passage.reference, passage.text]).encode())
    return digest.hexdigest()


@contextmanager
def _naming(passages: Sequence[Passage]) -> Iterator[None]:
    """Say which passage the row of an error belongs to."""
    try:
        yield
    except TextError as error:
        where = "" if error.row is None else f"{passages[error.row].reference}: "
        raise type(error)(f"{where}{error}", row=error.row) from error


def _origin(source: Source) -> dict[str, Any]:
    """Return what has to be said to load the model again."""
    return {
        "model": _absolute(source.name),
        "adapter": None if source.named_adapter is None else _absolute(source.named_adapter),
        "preset": source.preset.to_json() if isinstance(source.preset, ModelSettings) else source.preset,
    }


def _absolute(name: str) -> str:
    """Return the name of a model or adapter; a local folder's is absolute, as a search may start elsewhere."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name not in BUILTIN and folder.is_dir() else name


def _connect(folder: Path) -> Any:
    return lancedb.connect(str(folder))


def _table(passages: Sequence[Passage], refinement: Refinement) -> Any:
    vectors = np.ascontiguousarray(refinement.vectors)
    columns: dict[str, Any] = {
        name: pyarrow.array([getattr(passage, name) for passage in passages], type=pyarrow.string())
        for name in ("reference", "summary", "text")
    }
    flat = pyarrow.array(vectors.reshape(-1), type=pyarrow.float32())
    columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    columns["steps"] = pyarrow.array(refinement.steps, type=pyarrow.int32())
    columns["truncated"] = pyarrow.array(refinement.truncated)
    return pyarrow.table(columns)


def _read_description(folder: Path) -> Description:
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise ConfigurationError(f"{folder}: there is no index (no {DESCRIPTION_FILE}); make one with: genembed index PATH -o {folder}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value.pop("format_version", None)
        description = Description(**value)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error
    if version != FORMAT_VERSION:
        raise ConfigurationError(f"{path}: format_version {version!r} is not {FORMAT_VERSION}; build the index again with --overwrite.")
    return description


def _damaged(folder: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{folder}: the index is damaged; build it again with --overwrite. ({reason})")


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place where an index would destroy something.

    Raises:
        ConfigurationError: If there is a file, a folder of something else, or an index that is not to be overwritten.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: is a file; an index is a folder: choose another name.")
    if (folder / DESCRIPTION_FILE).is_file():
        if not overwrite:
            raise ConfigurationError(f"{folder}: there is an index already; replace it with --overwrite, or choose another folder.")
    elif any(folder.iterdir()):
        raise ConfigurationError(f"{folder}: is a folder with other things in it, which would be lost; choose another one.")
