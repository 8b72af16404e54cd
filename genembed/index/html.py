"""The text of a web page: what a reader sees, paragraph by paragraph, read with Beautiful Soup."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from genembed.errors import InputError, missing_extra

_CELLS = frozenset({"br", "td", "th"})
"""Elements that part words and no paragraphs."""
_BLOCKS = frozenset({"body", "caption", "html", "option", "title", "tr"})
"""Elements that part paragraphs, beside those that Beautiful Soup knows."""
_DECLARATION = "<meta charset="
"""Begins what names the encoding of a page, in ASCII."""


def html_paragraphs(content: bytes, name: str) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs of a web page: titles, headings, list entries, rows of tables; no scripts, styles or comments.

    Args:
        content: The file, in the encoding that it declares, or UTF-8 if it declares none.
        name: Stands in messages.

    Yields:
        The line a paragraph begins at, from 1, and the paragraph.

    Raises:
        InputError: If the bytes are not of that encoding, or Beautiful Soup gives up on them.
        MissingExtraError: If Beautiful Soup is not installed.
    """
    soup, text_type = _parsed(content, name)
    blocks = _BLOCKS | soup.builder.DEFAULT_BLOCK_ELEMENTS
    block: Any = None
    line, parts = 1, list[str]()
    nearest = {id(soup): soup}  # block around each element; looked up at each text, a page of nested elements would take for ever
    for node in soup.descendants:
        if node.name in _CELLS:
            parts.append(" ")
        if node.name is not None:
            nearest[id(node)] = node if node.name in blocks else nearest[id(node.parent)]
        if type(node) is not text_type:  # comments, scripts and styles are of other types
            continue
        around = nearest[id(node.parent)]
        if around is not block:
            if "".join(parts).strip():
                yield line, _clean(parts)
            line, block, parts = max(line, around.sourceline or 1), around, []  # what stands after an inner block is below it
        parts.append(str(node))
    if "".join(parts).strip():
        yield line, _clean(parts)


def _parsed(content: bytes, name: str) -> tuple[Any, Any]:
    try:
        import bs4
        from bs4.dammit import EncodingDetector
    except ModuleNotFoundError as error:
        raise missing_extra("index", "beautifulsoup4") from error
    content, mark = EncodingDetector.strip_byte_order_mark(content)
    text = _decoded(content, mark, EncodingDetector.find_declared_encoding(content, is_html=True), name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a page of XHTML is read as HTML, and a page may look like a file's name
            return bs4.BeautifulSoup(text, "html.parser"), bs4.NavigableString
    except (bs4.ParserRejectedMarkup, ValueError) as error:  # the latter for a character's number of thousands of digits
        reason = str(error).rpartition("Error: ")[2]  # the parser's, without Beautiful Soup's advice to programmers before it
        raise InputError(f"{name}: is markup that cannot be read as a web page: {reason}; mend it, or leave the file out.") from None


def _decoded(content: bytes, mark: str | None, declared: str | None, name: str) -> str:
    """Decode a page by its byte-order mark, or else by what it declares, if it can have declared that."""
    encoding = mark or declared or "utf-8"
    try:
        if mark is None and _DECLARATION.encode(encoding) != _DECLARATION.encode():
            encoding = "utf-8"  # a declaration that was found as ASCII is not UTF-16, whatever it says; HTML5 reads such a page as UTF-8
        text = content.decode(encoding)
        text.encode()  # some of Python's own encodings give halves of surrogate pairs, which no model takes
    except (LookupError, ValueError) as error:  # ValueError is what all errors of encodings are
        raise InputError(
            f"{name}: is not {encoding}, which it has to be as it declares that or nothing that it can be: {error}; write the encoding "
            "into its <meta charset>, or convert it."
        ) from None
    return text


def _clean(parts: list[str]) -> str:
    return " ".join("".join(parts).split())
