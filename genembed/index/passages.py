"""What is put into an index: rows of files, passages of text files, docstrings of Python source."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from genembed.docstrings import Docstring, docstrings
from genembed.errors import ConfigurationError, GenembedWarning, InputError
from genembed.files import STANDARD_STREAM, decoded_lines, read_texts

_PASSAGE_WORDS = 200
_DOCSTRING_CHARACTERS, _SIGNATURE_CHARACTERS = 250, 80
"""A docstring says what it is about at its beginning; what follows costs time and blurs the vector."""

_PROSE = (".txt", ".md", ".rst")
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Passage:
    """A text to be found, and how to show it."""

    text: str
    """What is embedded."""
    reference: str
    """Where it is: `notes.md:12`, an id, or a name such as `shutil.copytree`."""
    summary: str
    """One line to show for it."""


def read_passages(
    paths: Iterable[str | Path], *, file_format: str | None = None, text_column: str | None = None, id_column: str | None = None
) -> Iterator[Passage]:
    """Read the passages of files and folders.

    A file of rows (txt, jsonl, csv, parquet, `-` for stdin) gives one passage for each row. A folder is searched for `.txt`,
    `.md` and `.rst`, which are cut at paragraphs, and for `.py`, which give one passage for each documented public
    function, class or method.

    Args:
        paths: Files and folders.
        file_format: Format of the files of rows, where their names do not tell.
        text_column: Column of the text in files of rows.
        id_column: Column of the reference in files of rows.

    Raises:
        ConfigurationError: If a path does not exist, or a folder has no file of these kinds.
        InputError: If a file's content is not what its name says. In a folder such a file is left out, with a warning.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from _folder_passages(path)
        elif path.suffix.lower() in (".py", ".md", ".rst") and file_format is None:
            yield from _file_passages(path)
        else:
            for record in read_texts(path, file_format=file_format, text_column=text_column, id_column=id_column):
                if not record.text.strip():
                    continue  # an empty line between texts is no passage
                name = "stdin" if str(path) == STANDARD_STREAM else str(path)
                yield Passage(record.text, record.id if id_column else f"{name}:{record.line}", beginning_of(record.text))


def docstring_passage(docstring: Docstring, reference: str) -> Passage:
    """Make a passage of a docstring: name and signature, and the beginning of what it says."""
    signature = beginning_of(docstring.signature, _SIGNATURE_CHARACTERS)
    text = f"{docstring.name}{signature}: {beginning_of(docstring.text, _DOCSTRING_CHARACTERS)}"
    return Passage(text, reference, beginning_of(docstring.summary))


def beginning_of(text: str, characters: int = 160) -> str:
    """Return the beginning of a text on one line."""
    line = " ".join(text[: 4 * characters].split())
    return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"


def split_prose(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Cut a text at empty lines into passages of at most 200 words; a longer paragraph is cut between words.

    Args:
        lines: The text's lines.

    Yields:
        The line a passage begins at, from 1, and the passage.
    """
    first, words, parts = 1, 0, list[str]()
    for line, paragraph in _paragraphs(lines):
        length = len(_WORD.findall(paragraph))
        if parts and words + length > _PASSAGE_WORDS:
            yield first, "\n\n".join(parts)
            words, parts = 0, []
        if not parts:
            first = line
        words, parts = words + length, [*parts, paragraph]
    if parts:
        yield first, "\n\n".join(parts)


def _paragraphs(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield paragraphs of at most as many words as a passage has, with the line each begins at."""
    first, words, parts = 1, 0, list[str]()
    for number, line in enumerate([*lines, ""], start=1):
        pieces = _pieces(line.strip())
        for piece in pieces or [""]:
            length = len(_WORD.findall(piece))
            if parts and (not piece or words + length > _PASSAGE_WORDS):
                yield first, "\n".join(parts)
                words, parts = 0, []
            if piece:
                first = first if parts else number
                words, parts = words + length, [*parts, piece]


def _pieces(line: str) -> list[str]:
    """Cut one long line between words."""
    ends = [word.end() for word in _WORD.finditer(line)][_PASSAGE_WORDS - 1 :: _PASSAGE_WORDS]
    pieces = [line[start:end].strip() for start, end in zip([0, *ends], [*ends, len(line)], strict=True)]
    return [piece for piece in pieces if piece]


def _folder_passages(folder: Path) -> Iterator[Passage]:
    skipped: list[str] = []
    found = 0
    for path in _files(folder):
        found += 1
        try:
            yield from list(_file_passages(path))
        except (InputError, ConfigurationError) as error:
            skipped.append(str(error))
    if not found:
        raise ConfigurationError(
            f"{folder}: no {', '.join((*_PROSE, '.py'))} file in this folder or below it; name the files to be indexed."
        )
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {found} files below {folder} were left out; the first: {skipped[0]}", GenembedWarning, stacklevel=2
        )


def _files(folder: Path) -> Iterator[Path]:
    for where, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            if Path(name).suffix.lower() in (*_PROSE, ".py") and not name.startswith("."):
                yield Path(where, name)


def _file_passages(path: Path) -> Iterator[Passage]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file.") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if path.suffix.lower() == ".py":
        yield from _python_passages(path, content)
        return
    for line, text in split_prose(list(decoded_lines(content.splitlines(keepends=True), str(path)))):
        yield Passage(text, f"{path}:{line}", beginning_of(text))


def _python_passages(path: Path, content: bytes) -> Iterator[Passage]:
    module = path.parent.resolve().name if path.stem == "__init__" else path.stem
    try:
        for docstring in docstrings(content, module):
            passage = docstring_passage(docstring, f"{path}:{docstring.line}")
            yield replace(passage, summary=f"{docstring.name}: {passage.summary}")
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}" if error.lineno else str(path)
        raise InputError(f"{where}: not readable as Python: {error.msg}.") from error
