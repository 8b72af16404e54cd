"""A report as a value: sections of text, tables and figures, written as HTML, Markdown, CSV and JSON with the same content."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genembed.analyse.intervals import Estimate
from genembed.errors import ConfigurationError

NUMBERS = "report.json"
"""All numbers; a folder with this file is a report, which a later one may replace."""

Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str
    heading: str
    """With the unit."""
    digits: int = 2
    """Shown after the point; CSV and JSON have all of them."""
    signed: bool = False
    """Whether a plus is shown: a difference."""


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers, and how they are shown."""

    name: str
    """Of its CSV file."""
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Cell]]

    def cells(self) -> list[list[str]]:
        """Return what is shown."""
        return [[_shown(row[column.key], column) for column in self.columns] for row in self.rows]

    def csv(self) -> str:
        """Return the numbers as CSV; an interval takes two columns of its own."""
        spread = {column.key: any(isinstance(row[column.key], Estimate) for row in self.rows) for column in self.columns}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([name for key, wide in spread.items() for name in ([key, f"{key}_low", f"{key}_high"] if wide else [key])])
        for row in self.rows:
            writer.writerow([value for key, wide in spread.items() for value in _parts(row[key], wide=wide)])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        rows = [{column.key: _json(row[column.key]) for column in self.columns} for row in self.rows]
        return {"name": self.name, "caption": self.caption, "rows": rows}


@dataclass(frozen=True, eq=False)
class Figure:
    """A picture of a table's numbers."""

    table: Table
    """What is drawn; its name is that of the picture and its CSV file."""
    draw: Callable[[Path], None] = field(repr=False)
    """Writes the picture."""


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, paragraphs, tables and figures."""

    title: str
    text: tuple[str, ...]
    parts: tuple[Table | Figure, ...]


@dataclass(frozen=True, eq=False)
class Document:
    """A report."""

    title: str
    settings: Mapping[str, Any]
    """What was analysed, and how."""
    sections: tuple[Section, ...]

    def write(self, folder: Path) -> None:
        """Write all files into an empty folder."""
        tables = [part.table if isinstance(part, Figure) else part for section in self.sections for part in section.parts]
        assert len({table.name for table in tables}) == len(tables), "each table has a file of its own"
        for section in self.sections:
            for part in section.parts:
                if isinstance(part, Figure):
                    part.draw(folder / f"{part.table.name}.png")
        files = {f"{table.name}.csv": table.csv() for table in tables}
        files |= {"report.md": self.markdown(), "index.html": self.html(), NUMBERS: json.dumps(self.to_json(), indent=1) + "\n"}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

    def markdown(self) -> str:
        """Return the report as Markdown."""
        blocks = [f"# {self.title}", _markdown_table(("", ""), [[key, str(value)] for key, value in self.settings.items()])]
        for section in self.sections:
            blocks += [f"## {section.title}", *section.text]
            for part in section.parts:
                if isinstance(part, Figure):
                    name = part.table.name
                    blocks.append(f"![{part.table.caption}]({name}.png)\n\n{part.table.caption} ([numbers]({name}.csv))")
                else:
                    shown = _markdown_table([column.heading for column in part.columns], part.cells())
                    blocks.append(f"{part.caption} ([numbers]({part.name}.csv))\n\n{shown}")
        return "\n\n".join(blocks) + "\n"

    def html(self) -> str:
        """Return the report as one HTML page, which shows the pictures beside it."""
        settings = _html_table(("", ""), [[key, str(value)] for key, value in self.settings.items()], labels=2)
        body = [f"<h1>{html.escape(self.title)}</h1>", settings]
        for section in self.sections:
            body += [f"<h2>{html.escape(section.title)}</h2>", *(f"<p>{html.escape(text)}</p>" for text in section.text)]
            body += [_html_part(part) for part in section.parts]
        return _PAGE.format(title=html.escape(self.title), style=_STYLE, body="\n".join(body))

    def to_json(self) -> dict[str, Any]:
        """Return everything that is said, with all digits."""
        sections = [
            {
                "title": section.title,
                "text": list(section.text),
                "tables": [(part.table if isinstance(part, Figure) else part).to_json() for part in section.parts],
            }
            for section in self.sections
        ]
        return {"title": self.title, "settings": dict(self.settings), "sections": sections}


def check_target(folder: Path) -> None:
    """Refuse a place where a report would destroy something; an earlier report gives way.

    Raises:
        ConfigurationError: If there is a file, or a folder with something else in it.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / NUMBERS).is_file() or not any(folder.iterdir()))):
        raise ConfigurationError(f"{folder}: is there and is no report; choose a new folder.")


def _shown(value: Cell, column: Column) -> str:
    if value is None:
        return ""
    if isinstance(value, Estimate):
        return f"{_number(value.value, column)} [{_number(value.low, column)}, {_number(value.high, column)}]"
    return _number(value, column) if isinstance(value, float) else str(value)


def _number(value: float, column: Column) -> str:
    return "n/a" if math.isnan(value) else f"{value:{'+' if column.signed else ''}.{column.digits}f}"


def _parts(value: Cell, *, wide: bool) -> list[Any]:
    if isinstance(value, Estimate):
        return [value.value, value.low, value.high]
    return [value, None, None] if wide else [value]


def _json(value: Cell) -> Any:
    if isinstance(value, Estimate):
        return {"value": _json(value.value), "low": _json(value.low), "high": _json(value.high)}
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1) -> str:
    """Return a table whose first columns are text, set left."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=l' if i < labels else ''}>{html.escape(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    head = f"<thead>{line(headings, 'th')}</thead>" if any(headings) else ""
    return f"<div class=scroll><table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table></div>"


def _html_part(part: Table | Figure) -> str:
    table = part.table if isinstance(part, Figure) else part
    caption, link = html.escape(table.caption), f'<a href="{table.name}.csv">numbers</a>'
    if isinstance(part, Figure):
        return f'<figure><img src="{table.name}.png" alt="{caption}"><figcaption>{caption} ({link})</figcaption></figure>'
    texts = [column.key for column in table.columns if any(isinstance(row[column.key], str) for row in table.rows)]
    shown = _html_table([column.heading for column in table.columns], table.cells(), labels=max(1, len(texts)))
    return f"<p class=caption>{caption} ({link})</p>{shown}"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ddd }
p { max-width: 46rem; margin: .6rem 0 } .caption, figcaption { font-size: .9rem; color: #444; margin-top: 1.2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; vertical-align: bottom }
th { border-bottom: 2px solid #888; white-space: normal } .l { text-align: left }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto } a { color: #0072b2 }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
