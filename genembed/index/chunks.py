"""A text cut into passages: prose at empty lines, source code between its blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_PASSAGE_WORDS = 200
_BLOCK_WORDS = 80
"""A passage of code ends at the first empty line after so many words: shorter blocks stay with their neighbours."""

_WORD = re.compile(r"\S+")

Numbered = tuple[int, str]
"""A piece of a text, and the line it begins at, from 1."""


def split_prose(lines: Sequence[str]) -> Iterator[Numbered]:
    """Cut a text at empty lines into passages of at most 200 words; a longer paragraph is cut between words.

    Args:
        lines: The text's lines.

    Yields:
        The line a passage begins at, from 1, and the passage.
    """
    return group_paragraphs(_paragraphs(lines))


def group_paragraphs(paragraphs: Iterable[Numbered]) -> Iterator[Numbered]:
    """Join paragraphs that follow one another into passages of at most 200 words; one that is longer is cut between words.

    Args:
        paragraphs: Each with the line it begins at.

    Yields:
        The line a passage begins at, and the passage.
    """
    first, words, parts = 1, 0, list[str]()
    for line, paragraph in paragraphs:
        for piece in _pieces(paragraph):
            length = _count(piece)
            if parts and words + length > _PASSAGE_WORDS:
                yield first, "\n\n".join(parts)
                words, parts = 0, []
            if not parts:
                first = line
            words, parts = words + length, [*parts, piece]
    if parts:
        yield first, "\n\n".join(parts)


def split_code(lines: Sequence[str]) -> Iterator[Numbered]:
    """Cut source code at empty lines into passages of about 80 to 200 words, indentation kept; a longer block is cut between lines.

    Args:
        lines: The file's lines.

    Yields:
        The line a passage begins at, from 1, and the passage.
    """
    first, words, parts = 1, 0, list[str]()
    for number, line in enumerate(lines, start=1):
        for piece in _pieces(line.rstrip()) or [""]:
            length = _count(piece)
            if parts and (words + length > _PASSAGE_WORDS or (not piece and words >= _BLOCK_WORDS)):
                yield first, "\n".join(parts).rstrip()
                words, parts = 0, []
            if piece or parts:
                first = first if parts else number
                words, parts = words + length, [*parts, piece]
    if parts:
        yield first, "\n".join(parts).rstrip()


def _paragraphs(lines: Sequence[str]) -> Iterator[Numbered]:
    """Yield paragraphs of at most as many words as a passage has, with the line each begins at."""
    first, words, parts = 1, 0, list[str]()
    for number, line in enumerate([*lines, ""], start=1):
        pieces = _pieces(line.strip())
        for piece in pieces or [""]:
            length = _count(piece)
            if parts and (not piece or words + length > _PASSAGE_WORDS):
                yield first, "\n".join(parts)
                words, parts = 0, []
            if piece:
                first = first if parts else number
                words, parts = words + length, [*parts, piece]


def _pieces(text: str) -> list[str]:
    """Cut a text that is too long for one passage between words; an empty one has no pieces."""
    ends = [word.end() for word in _WORD.finditer(text)][_PASSAGE_WORDS - 1 :: _PASSAGE_WORDS]
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [piece if place == 0 else piece.strip() for place, piece in enumerate(pieces) if piece.strip()]


def _count(text: str) -> int:
    return len(_WORD.findall(text))
