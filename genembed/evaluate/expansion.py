"""Texts with what a causal language model adds to them, written once and kept on disk (GIRCSE 2025, appendix F)."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from genembed import checkpoint
from genembed.errors import CheckpointError, ConfigurationError, GenembedWarning
from genembed.evaluate.writer import DEFAULT_TOKENS, PROMPT, Expansion, Writer
from genembed.settings import ModelSettings
from genembed.source import Source, read_json, resolve
from genembed.source import sha256 as file_sha256
from genembed.tokens import check_texts

EXPANSIONS_FOLDER = "expansions"
"""Beside mteb's results, one file for each language model."""

_AS_LANGUAGE_MODEL = ModelSettings(special_tokens="tokenizer")
"""Whatever a folder says of embedding, here it is read as the causal language model that it is."""
_DECIDING = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files of a model folder that decide what it writes: weights, configuration, tokenizer, chat template, stop tokens."""


@dataclass
class ExpansionWork:
    """What expanding took since the counts were last taken; a text that occurs several times in one call counts once."""

    generated_texts: int = 0
    """Texts that the language model was asked for."""
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    reused_texts: int = 0
    """Texts whose expansion was there already."""
    shortened: int = 0
    """Texts, of both, that the language model did not see whole."""


class ExpansionFile:
    """Expansions on disk by key, one JSON line each; appended as they are made, so that a killed run goes on where it was."""

    def __init__(self, path: Path) -> None:
        """Name the file; it is read, or made, when it is needed.

        Args:
            path: The file.
        """
        self.path = path

    @cached_property
    def kept(self) -> dict[str, Expansion]:
        """What is in the file; a line that was cut by a kill is passed over, and its text expanded again.

        Raises:
            ConfigurationError: If the file is there and cannot be read.
        """
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        except OSError as error:
            raise ConfigurationError(f"{self.path}: cannot be read: {error.strerror or error}; choose another place, -o.") from error
        return dict(row for line in lines if (row := _parsed(line)) is not None)

    def append(self, made: Mapping[str, Expansion]) -> None:
        """Write expansions behind those that are there.

        Args:
            made: Expansions by key.

        Raises:
            ConfigurationError: If the file cannot be written.
        """
        self.kept.update(made)
        content = "".join(json.dumps({"key": key, **asdict(expansion)}) + "\n" for key, expansion in made.items()).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell():  # behind a line that was cut, a line of its own
                    file.seek(-1, 2)
                    content = content if file.read(1) == b"\n" else b"\n" + content
                file.write(content)
        except OSError as error:
            raise ConfigurationError(f"{self.path}: cannot be written: {error.strerror or error}; choose another place, -o.") from error


class Expander:
    """Expands texts with a causal language model, each text only once.

    The expansions lie in `folder/expansions/MODEL-HASH.jsonl`. The weights are loaded when the first text is not there, so an embedder
    that comes second needs no memory for them.
    """

    def __init__(
        self,
        model: str | Path,
        folder: Path,
        *,
        budget: int = DEFAULT_TOKENS,
        device: str = "auto",
        dtype: str = "auto",
        offline: bool = False,
    ) -> None:
        """Find the language model and hash what decides its words.

        Args:
            model: Folder or hub id of a causal language model.
            folder: Where results are kept.
            budget: Most tokens of an expansion, at least 1.
            device: Where it works.
            dtype: Of its weights, as for `genembed.load`.
            offline: Never touch the network.

        Raises:
            ConfigurationError: If the budget is no budget, or the model no causal language model.
            CheckpointError: If the model's files are missing, or unsafe.
        """
        if budget < 1:
            raise ConfigurationError(
                f"--expand-tokens {budget}: at least one token is needed; to embed texts alone, leave --expand-with out."
            )
        try:
            self.source = resolve(model, adapter=None, preset=_AS_LANGUAGE_MODEL, offline=offline)
        except CheckpointError as error:
            raise CheckpointError(f"--expand-with {error}") from error
        _check_writes(self.source)
        self.budget, self.device, self.dtype = budget, device, dtype
        revision = _revision(self.source, dtype)
        self.label = f"{_short_name(self.source.name)}-{revision}"
        self.file = ExpansionFile(folder / EXPANSIONS_FOLDER / f"{self.label}.jsonl")
        self.work = ExpansionWork()

    @cached_property
    def writer(self) -> Writer:
        """The language model, loaded when it is first needed.

        Raises:
            CheckpointError: If it cannot be loaded.
        """
        return Writer(checkpoint.load(self.source, device=self.device, dtype=self.dtype), self.budget)

    def take_work(self) -> ExpansionWork:
        """Return the counts since they were last taken."""
        work, self.work = self.work, ExpansionWork()
        return work

    def expand(self, texts: Sequence[str], instruction: str) -> list[Expansion]:
        """Return an expansion for each text, from the file or else from the language model; a warning counts shortened texts.

        Args:
            texts: Texts.
            instruction: What the embedding is for.

        Raises:
            TextError: If a text is not valid Unicode, or does not fit into memory.
            ConfigurationError: If the model's window has no room for the prompt, or the file cannot be written.
            CheckpointError: If the language model cannot be loaded.
        """
        check_texts(texts)
        keys = [self.key(text, instruction) for text in texts]
        distinct = dict(zip(keys, texts, strict=True))
        missing = {key: text for key, text in distinct.items() if key not in self.file.kept}
        if missing:
            self._write(missing, instruction)
        shortened = sum(self.file.kept[key].shortened for key in distinct)
        self.work.reused_texts += len(distinct) - len(missing)
        self.work.shortened += shortened
        if shortened:
            warnings.warn(
                f"{shortened} of {len(distinct)} texts did not fit into the window of {self.source.name} beside the prompt and "
                f"{self.budget} new tokens; it saw their beginning alone, the embedder reads them whole.",
                GenembedWarning,
                stacklevel=2,
            )
        return [self.file.kept[key] for key in keys]

    def key(self, text: str, instruction: str) -> str:
        """Hash what decides an expansion: model and prompt, budget, instruction, text."""
        return sha256(json.dumps([self.label, self.budget, instruction, text]).encode()).hexdigest()[:32]

    def _write(self, missing: Mapping[str, str], instruction: str) -> None:
        keys, texts = list(missing), list(missing.values())
        writer = self.writer
        start = time.perf_counter()
        with tqdm(total=len(texts), desc="expanding", unit="text", delay=1, leave=False) as bar:
            for batch in writer.write(texts, instruction):
                self.file.append({keys[row]: expansion for row, expansion in batch.items()})
                self.work.generated_texts += len(batch)
                self.work.generated_tokens += sum(expansion.tokens for expansion in batch.values())
                bar.update(len(batch))
        self.work.generation_seconds += time.perf_counter() - start


def _parsed(line: bytes) -> tuple[str, Expansion] | None:
    try:
        row = json.loads(line)
        return str(row.pop("key")), Expansion(**row)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _check_writes(source: Source) -> None:
    kind = read_json(source.base / "config.json").get("model_type")
    if kind == "bert":  # other encoders are refused where models are loaded
        raise ConfigurationError(f"--expand-with {source.name}: is an encoder ({kind}), which cannot write; name a causal language model.")


def _short_name(name: str) -> str:
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name.rpartition("/")[2]


def _revision(source: Source, dtype: str) -> str:
    digest = sha256(f"{PROMPT} {dtype}".encode())
    for folder in (source.base, source.adapter):
        files: Iterable[Path] = () if folder is None else sorted(path for path in folder.iterdir() if path.suffix in _DECIDING)
        for path in files:
            digest.update(f"{path.name} {file_sha256(path)}".encode())
    return digest.hexdigest()[:12]
