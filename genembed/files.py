"""Texts in, vectors out: the file formats of the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Bool, Int, Shaped
from tqdm import tqdm

from genembed.errors import ConfigurationError, InputError, missing_extra
from genembed.records import BATCH_ROWS, TEXT_COLUMN, Columns, Record, allow_long_fields, bounded_lines, json_object, plain_rows

STANDARD_STREAM = "-"
"""Stands for stdin as a source and for stdout as a target."""

Binary = IO[bytes] | io.BufferedIOBase
"""An open file or stream of bytes."""

_ASIDE = ".genembed-old-"
"""Begins the name of a folder that another one is about to replace."""


@dataclass(frozen=True)
class VectorRows:
    """What is written for each text."""

    ids: Sequence[str]
    vectors: Shaped[np.ndarray, "texts codes"]
    steps: Int[np.ndarray, "texts"]
    truncated: Bool[np.ndarray, "texts"]


def read_texts(
    source: str | Path, *, file_format: str | None = None, text_column: str | None = None, id_column: str | None = None
) -> Iterator[Record]:
    """Read the texts of a file, one after the other.

    Args:
        source: File of text lines (`.txt`), of JSON objects (`.jsonl`), `.csv` with a header, `.parquet`, or `-` for stdin,
            which is taken as JSON objects if it begins with `{` and as text lines otherwise.
        file_format: `txt`, `jsonl`, `csv` or `parquet`, where name and beginning do not tell.
        text_column: Column or field of the text.
        id_column: Column or field of the id.

    Raises:
        ConfigurationError: If the file or its format is unknown, or a column is named for text lines, which have none.
        InputError: If the content is not what the format says; the message has the line.
    """
    if file_format is not None and file_format not in _READERS:
        raise ConfigurationError(f"format {file_format!r} is unknown; choose one of {', '.join(_READERS)}.")
    if str(source) == STANDARD_STREAM:
        return _read_stream(sys.stdin.buffer, file_format, text_column, id_column)
    path = Path(source)
    if path.is_dir():
        raise ConfigurationError(f"{path}: is a folder; name a file, or search the folder's files with: genembed index {path} -o DIR")
    if not path.exists():
        raise ConfigurationError(f"{path}: no such file.")
    return _read_file(path, file_format or _format_of(path), text_column, id_column)


def _read_file(path: Path, file_format: str, text_column: str | None, id_column: str | None) -> Iterator[Record]:
    columns = _columns(file_format, text_column, id_column)
    try:
        with path.open("rb") as file:
            rows = file if file_format == "parquet" else bounded_lines(file, str(path))
            yield from _READERS[file_format](rows, str(path), columns)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _read_stream(stream: Binary, file_format: str | None, text_column: str | None, id_column: str | None) -> Iterator[Record]:
    if file_format == "parquet":
        lines: Any = io.BytesIO(stream.read())
    else:
        following = bounded_lines(stream, "stdin")
        first = next(following, b"")
        lines = chain([first] if first else [], following)
        file_format = file_format or ("jsonl" if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") else "txt")
    yield from _READERS[file_format](lines, "stdin", _columns(file_format, text_column, id_column))


def _format_of(path: Path) -> str:
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in _READERS:
        raise ConfigurationError(
            f"{path}: file type {path.suffix!r} is unknown; known are {', '.join(f'.{known}' for known in _READERS)}: say with --format "
            "which one it is."
        )
    return suffix


def _columns(file_format: str, text_column: str | None, id_column: str | None) -> Columns:
    if file_format == "txt" and (text_column or id_column):
        option, value = ("--text-column", text_column) if text_column else ("--id-column", id_column)
        raise ConfigurationError(f"{option} {value}: text lines have no columns; leave it out, or say with --format what the file is.")
    return Columns(text_column or TEXT_COLUMN, id_column)


def decoded_lines(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode lines as UTF-8, each with its line end.

    Raises:
        InputError: If a line is not UTF-8; the message has its number.
    """
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; convert the file first, for "
                "example with: iconv -f latin1 -t utf-8"
            ) from None


def _read_lines(lines: Iterable[bytes], name: str, _: Columns) -> Iterator[Record]:
    for number, line in enumerate(decoded_lines(lines, name)):
        yield Record(str(number), line.removesuffix("\n").removesuffix("\r"), number + 1)


def _read_jsonl(lines: Iterable[bytes], name: str, columns: Columns) -> Iterator[Record]:
    number = 0
    for line, content in enumerate(decoded_lines(lines, name), start=1):
        if not content.strip():
            continue
        place = f"{name}, line {line}"
        row = json_object(content, place)
        columns.check(list(row), place)
        yield columns.record(row, number, line=line, place=place)
        number += 1


def _read_csv(lines: Iterable[bytes], name: str, columns: Columns) -> Iterator[Record]:
    allow_long_fields()
    reader = csv.reader(decoded_lines(lines, name), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        columns.check(header, name)
        number, line = 0, reader.line_num + 1
        for values in reader:
            place = f"{name}, line {line}"
            if values and len(values) != len(header):
                raise InputError(
                    f"{place}: {len(values)} fields, but the header has {len(header)}; put quotes around a text that holds commas."
                )
            if values:
                yield columns.record(dict(zip(header, values, strict=True)), number, line=line, place=place)
                number += 1
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: not valid CSV: {error}.") from error


def _read_parquet(file: Any, name: str, columns: Columns) -> Iterator[Record]:
    arrow, parquet = _arrow()
    try:
        table = parquet.ParquetFile(file)
        columns.check(table.schema_arrow.names, name)
        wanted = [column for column in (columns.text, columns.id) if column is not None]
        number = 0
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
            for row in plain_rows(batch, name):
                yield columns.record(row, number, line=number + 1, place=f"{name}, row {number}")
                number += 1
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read as Parquet: {error}") from error


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise missing_extra("cli", "pyarrow") from error
    return pyarrow, parquet


_READERS: dict[str, Callable[[Any, str, Columns], Iterator[Record]]] = {
    "txt": _read_lines,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


@contextmanager
def vector_file(target: str | Path) -> Iterator[Callable[[VectorRows], None]]:
    """Open a file for vectors and give the function that writes them; the file appears only when all is written.

    Args:
        target: `.npy` (one row for each text), `.parquet` or `.jsonl` (id, vector, steps, truncated), or `-` for
            JSON lines on stdout.

    Raises:
        ConfigurationError: If the type is unknown or the file cannot be written; nothing has been done then.
    """
    if str(target) == STANDARD_STREAM:
        sys.stdout.flush()
        yield partial(_write_jsonl, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    path = Path(target)
    if path.is_dir():
        raise ConfigurationError(f"{path}: is a folder; name a file in it, such as {path / 'vectors.npy'}")
    if path.suffix.lower() not in _WRITERS:
        raise ConfigurationError(f"{path}: output type {path.suffix!r} is unknown; choose one of {', '.join(_WRITERS)}, or - for stdout.")
    with replacing(path) as file:
        yield partial(_WRITERS[path.suffix.lower()], file)


@contextmanager
def replacing(path: Path) -> Iterator[Binary]:
    """Open a file for writing under another name; it takes the place of `path` when the block ends without an error.

    Raises:
        ConfigurationError: If the file cannot be made.
    """
    temporary = _beside(path)
    try:
        file = temporary.open("xb")  # never through a link, or into a file, that somebody else has put there
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror or error}; choose another place.") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or after a power cut the new name could belong to an empty file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a folder under another name; it takes the place of `path`, as `publish` says, when the block ends without an error.

    Raises:
        ConfigurationError: If the folder cannot be made; the one above it must be there.
    """
    path = path.resolve()  # "." has no name to put another one beside
    staged = _beside(path)
    try:
        staged.mkdir()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror or error}; choose another place.") from error
    try:
        yield staged
        publish(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish(staged: Path, final: Path) -> None:
    """Make a written folder durable and give it its name; a folder of that name gives way.

    The earlier folder is moved aside before, and deleted after: at every moment one whole folder lies under `final` or under the
    name from which `recover` brings it back.

    Args:
        staged: The written folder, on the same file system.
        final: The name it gets.
    """
    make_durable(staged)
    recover(final)
    try:
        if final.exists():
            final.rename(_aside(final))
        staged.rename(final)
        _sync(final.parent)
    finally:
        recover(final)


def make_durable(folder: Path) -> None:
    """Wait until everything in a folder is on the disk, and not in memory alone."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def recover(final: Path) -> None:
    """Bring back the folder that a killed `publish` had moved aside, or delete it if its successor is there."""
    aside = _aside(final)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(final)


def recover_all(folder: Path) -> None:
    """Bring back every folder in this one that a killed `publish` had moved aside."""
    for aside in folder.glob(f"{_ASIDE}*"):
        recover(folder / aside.name.removeprefix(_ASIDE))


def _beside(path: Path) -> Path:
    """Return a name in the same folder that nobody can have taken before."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _aside(final: Path) -> Path:
    return final.with_name(f"{_ASIDE}{final.name}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_npy(file: Binary, rows: VectorRows) -> None:
    np.save(file, rows.vectors)


def _write_jsonl(file: Binary, rows: VectorRows) -> None:
    columns = zip(rows.ids, rows.vectors, rows.steps.tolist(), rows.truncated.tolist(), strict=True)
    for identifier, vector, steps, truncated in tqdm(columns, total=len(rows.ids), desc="writing", unit="text", delay=1, leave=False):
        # Nine digits give every float32 back exactly; seventeen would only be longer. Codes are whole numbers.
        numbers = vector.tolist() if vector.dtype.kind in "iu" else [float(f"{value:.9g}") for value in vector.tolist()]
        line = json.dumps({"id": identifier, "vector": numbers, "steps": steps, "truncated": truncated}, ensure_ascii=False)
        file.write(line.encode() + b"\n")


def _write_parquet(file: Binary, rows: VectorRows) -> None:
    arrow, parquet = _arrow()
    flat = arrow.array(np.ascontiguousarray(rows.vectors).reshape(-1))
    columns = {
        "id": arrow.array(list(rows.ids), type=arrow.string()),
        "vector": arrow.FixedSizeListArray.from_arrays(flat, rows.vectors.shape[1]),
        "steps": arrow.array(rows.steps, type=arrow.int32()),
        "truncated": arrow.array(rows.truncated),
    }
    parquet.write_table(arrow.table(columns), file)


_WRITERS: dict[str, Callable[[Binary, VectorRows], None]] = {".npy": _write_npy, ".parquet": _write_parquet, ".jsonl": _write_jsonl}
