"""What a job keeps in its folder, and what each of the files says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genembed.errors import CheckpointError, ConfigurationError
from genembed.jobs.plan import Plan
from genembed.jobs.storage import made_of, read_object

FORMAT_VERSION = 1
"""Of the job's files; a reader refuses another one."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a finished shard holds. Written after the shard: a shard without one is made again."""

    shard: int
    rows: int
    """Rows in the shard's file."""
    rejects: int
    """Rows in its rejects file; there is none for 0."""
    bytes: int
    sha256: str
    """Of the shard's file."""
    rejects_sha256: str | None
    """Of its rejects file."""
    steps: int
    """Refinement steps of all rows together."""
    tokens: int
    """Prompt tokens of all rows together."""
    truncated: int
    """Rows that lost their end to the model's length limit."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a job makes. Two jobs with equal identities make equal rows of the same texts."""

    identity: Mapping[str, Any]
    """Everything that decides a vector: the model's fingerprint, instruction, halting rule, output numbers."""
    origin: Mapping[str, Any]
    """Names by which the model is loaded again; they may change without changing a vector."""
    max_rejects: int
    """Rows that may be rejected before the job stops."""
    output: str
    """parquet or lance."""


class JobFolder:
    """Names and reading of the files of a job."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.job = root / "job.json"
        self.plan = root / "plan.json"
        self.manifest = root / "manifest.json"
        self.rejects = root / "rejects.jsonl"
        self.shards = root / "shards"
        self.receipts = root / "receipts"
        self.shard_rejects = root / "rejects"
        self.workers = root / "workers"
        self.locks = root / "locks"
        self.lance = root / "vectors.lance"

    def make(self) -> None:
        """Make the folders that are not there."""
        try:
            for folder in (self.shards, self.receipts, self.shard_rejects, self.workers, self.locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{self.root}: cannot be made: {error.strerror or error}; choose another place.") from error

    def shard_file(self, index: int) -> Path:
        """Return the file of a shard's vectors."""
        return self.shards / f"{index:06d}.parquet"

    def rejects_file(self, index: int) -> Path:
        """Return the file of the rows of a shard that could not be embedded."""
        return self.shard_rejects / f"{index:06d}.jsonl"

    def receipt_file(self, index: int) -> Path:
        """Return the file that says the shard is done."""
        return self.receipts / f"{index:06d}.json"

    def lock_file(self, name: int | str) -> Path:
        """Return the lock of a shard, or of another step."""
        return self.locks / (f"{name:06d}.lock" if isinstance(name, int) else f"{name}.lock")

    def read_description(self) -> Description:
        """Read what the job makes.

        Raises:
            ConfigurationError: If there is no job, or a newer genembed wrote it.
            CheckpointError: If it is damaged.
        """
        if not self.job.is_file():
            raise ConfigurationError(f"{self.root}: there is no job (no job.json); start one with: genembed job embed INPUT -o {self.root}")
        value = read_object(self.job)
        version = value.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigurationError(f"{self.job}: format_version {version!r} is not {FORMAT_VERSION}; embed into another folder.")
        return made_of(Description, value, self.job)

    def read_plan(self) -> Plan:
        """Read which rows belong to which shard.

        Raises:
            CheckpointError: If the file is missing or damaged.
        """
        return Plan.from_json(read_object(self.plan))

    def read_receipt(self, index: int) -> Receipt:
        """Read what a finished shard holds.

        Raises:
            CheckpointError: If the receipt is damaged.
        """
        path = self.receipt_file(index)
        receipt = made_of(Receipt, read_object(path), path)
        if receipt.shard != index:
            raise CheckpointError(f"{path}: is the receipt of shard {receipt.shard}.")
        return receipt

    def read_rejects(self, index: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a shard that could not be embedded.

        Raises:
            CheckpointError: If the file is damaged.
        """
        path = self.rejects_file(index)
        try:
            with path.open(encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: is damaged: {error}") from error
        if not all(isinstance(row, dict) and isinstance(row.get("number"), int) for row in rows):
            raise CheckpointError(f"{path}: is damaged: a line is no rejected row.")
        yield from rows


class Receipts:
    """The receipts of a job, each read once."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._known: dict[int, Receipt] = {}

    def refresh(self) -> Mapping[int, Receipt]:
        """Read those that are new, and return all, by shard."""
        for path in self._folder.receipts.glob("*.json"):
            index = int(path.stem) if path.stem.isdigit() else None
            if index is not None and index not in self._known:
                self._known[index] = self._folder.read_receipt(index)
        return self._known

    def has(self, index: int) -> bool:
        """Whether a shard is done, by now."""
        return index in self._known or self._folder.receipt_file(index).exists()


def description_json(description: Description) -> dict[str, Any]:
    """Return what `JobFolder.read_description` reads."""
    return {"format_version": FORMAT_VERSION, **asdict(description)}
