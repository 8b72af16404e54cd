"""The files of a corpus: found by path or URL, opened anywhere, known again by what they hold."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from lzma import LZMAError
from typing import Any

from genembed.errors import ConfigurationError, JobError, missing_extra
from genembed.jobs.formats import Stream

FORMATS = ("jsonl", "csv", "parquet", "txt")
_COMPRESSED = {"gz": "gzip", "bz2": "bz2", "xz": "xz"}
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of the corpus."""

    url: str
    """Local path, or URL of a file system that fsspec knows."""
    file_format: str
    """jsonl, csv, parquet or txt."""
    size: int
    """Bytes, as stored."""
    identity: str
    """What the file system says of this version of the file: changes when it is written again."""

    @contextmanager
    def open(self) -> Iterator[Stream]:
        """Open for reading; what is compressed is read as what it holds.

        Raises:
            JobError: If it cannot be read, now or later, or is not what its name says.
        """
        import fsspec

        try:
            with fsspec.open(self.url, "rb", compression=self._compression) as file:
                yield file
        except (OSError, EOFError, zlib.error, LZMAError) as error:
            raise JobError(f"{self.url}: cannot be read: {error}. What is done is kept; go on with the same command.") from error

    def sha256(self) -> str:
        """Return the hash of the file's bytes, uncompressed."""
        digest = hashlib.sha256()
        with self.open() as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    @cached_property
    def _compression(self) -> str | None:
        return _COMPRESSED.get(self.url.rsplit(".", 1)[-1].lower())


def find_files(inputs: Sequence[str], file_format: str | None) -> tuple[InputFile, ...]:
    """Return the files of a corpus, in the order given; those of a folder or a pattern in the order of their names.

    Args:
        inputs: Files, folders (read with everything below them), patterns such as `data/*.jsonl`, or URLs such as `s3://bucket/folder`.
        file_format: Of all files, where their names do not tell.

    Raises:
        ConfigurationError: If there is no such file, or none of a known format.
        MissingExtraError: If the file system of a URL needs a package that is not there.
    """
    if file_format is not None and file_format not in FORMATS:
        raise ConfigurationError(f"format {file_format!r} is unknown; choose one of {', '.join(FORMATS)}.")
    found = [file for place in inputs for file in _files_of(place, file_format)]
    seen: set[str] = set()
    for file in found:
        if file.url in seen:
            raise ConfigurationError(f"{file.url}: given twice, and every row would be embedded twice; name it once.")
        seen.add(file.url)
    return tuple(found)


def _files_of(place: str, file_format: str | None) -> list[InputFile]:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise missing_extra("jobs", "fsspec") from error
    try:
        system, path = fsspec.core.url_to_fs(place)
        several = system.isdir(path) or "*" in path
        paths = sorted(system.find(path) if system.isdir(path) else system.glob(path)) if several else [path]
        infos = [(name, system.info(name), system.ukey(name)) for name in paths]
    except ImportError as error:
        raise ConfigurationError(f"{place}: the file system of this URL needs a package that is not installed: {error}") from error
    except FileNotFoundError:
        raise ConfigurationError(f"{place}: no such file or folder.") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{place}: cannot be read: {error}") from error
    files = []
    for name, info, key in infos:
        kind = file_format or _format_of(name)
        if kind is None and not several:
            raise ConfigurationError(f"{place}: the name does not tell its format; say it with --format: {', '.join(FORMATS)}.")
        if kind is not None and info["type"] == "file":
            files.append(InputFile(url=_shown(system, name), file_format=kind, size=int(info["size"] or 0), identity=str(key)))
    if not files:
        raise ConfigurationError(f"{place}: no {', '.join(FORMATS)} file is there, compressed or not.")
    return files


def _format_of(name: str) -> str | None:
    """Return the format that a name tells; `rows.jsonl.gz` holds JSON lines."""
    suffixes = name.lower().rsplit("/", 1)[-1].split(".")[1:]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _shown(system: Any, path: str) -> str:
    """Return a path that opens again in another process; a local one without its protocol."""
    protocols: Sequence[str] = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    return path if "file" in protocols else str(system.unstrip_protocol(path))


def changed_file(then: Mapping[str, tuple[InputFile, str]], now: Sequence[InputFile]) -> str | None:
    """Tell what is different about the input, if anything; a file that was only touched or copied is not.

    Args:
        then: File and SHA-256, by URL, of when the job was planned.
        now: Files that are there.
    """
    if [file.url for file in now] != list(then):
        missing, added = sorted(then.keys() - {file.url for file in now}), sorted({file.url for file in now} - then.keys())
        if missing:
            return f"{missing[0]} is not among the input any more"
        return f"{added[0]} is new in the input" if added else "the files come in another order"
    for file in now:
        known, digest = then[file.url]
        if file.file_format != known.file_format:
            return f"{file.url} is read as {file.file_format}, and was as {known.file_format}"
        if (file.size, file.identity) != (known.size, known.identity) and (file.size != known.size or file.sha256() != digest):
            return f"{file.url} has changed ({file.size:,} bytes, then {known.size:,})"
    return None
