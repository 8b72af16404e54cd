"""What is put into an index: rows of files, passages of text files, docstrings of Python source."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from genembed.docstrings import Docstring, docstrings
from genembed.errors import ConfigurationError, GenembedWarning, InputError
from genembed.files import STANDARD_STREAM, decoded_lines
from genembed.index.chunks import group_paragraphs, split_code, split_prose
from genembed.index.html import html_paragraphs
from genembed.index.metadata import check_names, rows_with_metadata

_DOCSTRING_CHARACTERS, _SIGNATURE_CHARACTERS = 250, 80
"""A docstring says what it is about at its beginning; what follows costs time and blurs the vector."""

_PROSE = (".txt", ".md", ".rst")
_HTML = (".html", ".htm")
_CODE = (
    *(".c", ".cc", ".cpp", ".cs", ".cu", ".h", ".hpp", ".go", ".java", ".jl", ".kt", ".lua", ".php", ".pl", ".r", ".rb", ".rs", ".scala"),
    *(".bash", ".css", ".js", ".jsx", ".proto", ".ps1", ".sh", ".sql", ".swift", ".ts", ".tsx"),
)
"""Source code that is cut between its blocks."""
KINDS = (*_PROSE, *_HTML, ".py", *_CODE)
"""Files that a folder is searched for."""

STDIN = "stdin"
"""Path of the passages that were read from there."""


@dataclass(frozen=True)
class Passage:
    """A text to be found, and how to show it."""

    text: str
    """What is embedded."""
    reference: str
    """Where it is: `notes.md:12`, an id, or a name such as `shutil.copytree`."""
    summary: str
    """One line to show for it."""
    path: str = ""
    """File it was read from, as it was named, or `stdin`; empty if it is from none."""
    kind: str = ""
    """What the file is: the format that was named, or its ending without the dot, such as `md`; `stdin` if that is all that is known."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain values by column, for filters."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of the text."""
        return sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()  # what is no text is refused when it is embedded


def read_passages(
    paths: Iterable[str | Path],
    *,
    file_format: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    metadata: Sequence[str] = (),
    unread: list[str] | None = None,
) -> Iterator[Passage]:
    """Read the passages of files and folders.

    A file of rows (txt, jsonl, csv, parquet, `-` for stdin) gives one passage for each row. A folder is searched for prose
    (`.txt`, `.md`, `.rst`) and web pages, which are cut at paragraphs, for source code, which is cut between blocks, and for `.py`,
    which give one passage for each documented public function, class or method.

    Args:
        paths: Files and folders.
        file_format: Format of the files of rows, where their names do not tell.
        text_column: Column of the text in files of rows.
        id_column: Column of the reference in files of rows.
        metadata: Columns of files of rows that are kept for filters.
        unread: Gets the files and folders that were left out, for `Index.update`; it is complete when the last passage has come.

    Raises:
        ConfigurationError: If a path does not exist, a folder has no file of these kinds, or columns are named and no file has any.
        InputError: If a file's content is not what its name says. In a folder such a file is left out, with a warning, and so is a
            folder in it that cannot be listed.
    """
    check_names(metadata)
    unread = [] if unread is None else unread
    places = [Path(path) for path in paths]
    of_rows = [path for path in places if not path.is_dir() and (file_format is not None or path.suffix.lower() not in _OF_TEXT)]
    if metadata and not of_rows:
        raise ConfigurationError(f"--metadata {' '.join(metadata)}: only files of rows (jsonl, csv, parquet) have columns; none is named.")
    for path in places:
        if path.is_dir():
            yield from _folder_passages(path, unread)
        elif path in of_rows:
            yield from _row_passages(path, metadata, file_format=file_format, text_column=text_column, id_column=id_column)
        else:
            yield from _file_passages(path)


_OF_TEXT = frozenset({".py", ".md", ".rst", *_HTML, *_CODE})
"""Files that are texts as a whole when they are named, too; a named `.txt` is a file of rows."""


def _row_passages(
    path: Path, metadata: Sequence[str], *, file_format: str | None, text_column: str | None, id_column: str | None
) -> Iterator[Passage]:
    standard = str(path) == STANDARD_STREAM
    name = STDIN if standard else _shown(path)
    kind = file_format or path.suffix.lower().removeprefix(".") or STDIN
    rows = rows_with_metadata(path, metadata, file_format=file_format, text_column=text_column, id_column=id_column)
    for record, values in rows:
        if record.text.strip():  # an empty line between texts is no passage
            reference = record.id if id_column else f"{name}:{record.line}"
            yield Passage(record.text, reference, beginning_of(record.text), name, kind, values)


def docstring_passage(docstring: Docstring, reference: str) -> Passage:
    """Make a passage of a docstring: name and signature, and the beginning of what it says."""
    signature = beginning_of(docstring.signature, _SIGNATURE_CHARACTERS)
    text = f"{docstring.name}{signature}: {beginning_of(docstring.text, _DOCSTRING_CHARACTERS)}"
    return Passage(text, reference, beginning_of(docstring.summary))


def beginning_of(text: str, characters: int = 160) -> str:
    """Return the beginning of a text on one line."""
    line = " ".join(text[: 4 * characters].split())
    return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"


def _folder_passages(folder: Path, unread: list[str]) -> Iterator[Passage]:
    skipped, unlisted = dict[str, str](), dict[str, str]()
    found = 0
    for path in _files(folder, unlisted):
        found += 1
        try:
            yield from list(_file_passages(path))
        except (InputError, ConfigurationError) as error:
            skipped[_shown(path)] = str(error)
    unread.extend([*skipped, *unlisted])
    if not found and unlisted:
        raise ConfigurationError(f"{folder}: nothing to index was found: {next(iter(unlisted.values()))}; make it readable.")
    if not found:
        raise ConfigurationError(
            f"{folder}: no text, web page or source code in this folder or below it ({', '.join(KINDS)}); name the files to be indexed."
        )
    for left_out, what in ((skipped, f"{len(skipped)} of {found} files"), (unlisted, f"{len(unlisted)} folders")):
        if left_out:
            first = next(iter(left_out.values()))
            warnings.warn(f"{what} below {folder} were left out; the first: {first}", GenembedWarning, stacklevel=2)


def _files(folder: Path, unlisted: dict[str, str]) -> Iterator[Path]:
    """Find the files to be read, and note the folders that cannot be listed, with the reason."""

    def note(error: OSError) -> None:
        place = Path(error.filename or folder)  # a listing that breaks off does not say where
        unlisted[_shown(place)] = f"{place}: cannot be listed: {error.strerror or error}"

    for where, subfolders, names in os.walk(folder, onerror=note):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            if Path(name).suffix.lower() in KINDS and not name.startswith("."):
                yield Path(where, name)


def _file_passages(path: Path) -> Iterator[Passage]:
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path}: is no plain file, and a pipe or device may have no end; leave it out.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file.") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}.") from error
    suffix, shown = path.suffix.lower(), _shown(path)
    kind = "html" if suffix in _HTML else suffix.removeprefix(".")
    if suffix == ".py":
        yield from (replace(passage, path=shown, kind=kind) for passage in _python_passages(path, content))
        return
    if suffix in _HTML:
        pieces = group_paragraphs(html_paragraphs(content, str(path)))
    else:
        lines = list(decoded_lines(content.splitlines(keepends=True), str(path)))
        pieces = split_code(lines) if suffix in _CODE else split_prose(lines)
    for line, text in pieces:
        yield Passage(text, f"{shown}:{line}", beginning_of(text), shown, kind)


def _python_passages(path: Path, content: bytes) -> Iterator[Passage]:
    module = path.parent.resolve().name if path.stem == "__init__" else path.stem
    try:
        for docstring in docstrings(content, module):
            passage = docstring_passage(docstring, f"{_shown(path)}:{docstring.line}")
            yield replace(passage, summary=f"{docstring.name}: {passage.summary}")
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}" if error.lineno else str(path)
        raise InputError(f"{where}: not readable as Python: {error.msg}.") from error


def _shown(path: Path) -> str:
    """Return the name of a file as text; some file systems have names that are none."""
    return str(path).encode("utf-8", "backslashreplace").decode()
