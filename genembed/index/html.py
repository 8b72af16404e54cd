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


def html_paragraphs(content: bytes, name: str) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs of a web page: titles, headings, list entries, rows of tables; no scripts, styles or comments.

    Args:
        content: The file, in the encoding that it declares, or UTF-8 if it declares none.
        name: Stands in messages.

    Yields:
        The line a paragraph begins at, from 1, and the paragraph.

    Raises:
        InputError: If the bytes are not of that encoding.
        MissingExtraError: If Beautiful Soup is not installed.
    """
    soup, text_type = _parsed(content, name)
    blocks = _BLOCKS | soup.builder.DEFAULT_BLOCK_ELEMENTS
    block: Any = None
    line, parts = 1, list[str]()
    for node in soup.descendants:
        if node.name in _CELLS:
            parts.append(" ")
        if type(node) is not text_type:  # comments, scripts and styles are of other types
            continue
        around = next((parent for parent in node.parents if parent.name in blocks), soup)
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
    encoding = mark or EncodingDetector.find_declared_encoding(content, is_html=True) or "utf-8"
    try:
        text = content.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise InputError(
            f"{name}: is not {encoding}, which it has to be as it declares that or nothing: {error}; write the encoding into its "
            "<meta charset>, or convert it."
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a page of XHTML is read as HTML, and a page may look like a file's name
        return bs4.BeautifulSoup(text, "html.parser"), bs4.NavigableString


def _clean(parts: list[str]) -> str:
    return " ".join("".join(parts).split())
