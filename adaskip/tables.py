"""Plain tables as text that is also markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

MISSING = "–"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns also line up as plain text; the first is left-aligned."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(3, *(_width(row[column]) for row in cells)) for column in range(len(header))]
    lines = [_line(row, widths) for row in cells]
    rule = [
        ("-" * width if not index else "-" * (width - 1) + ":")
        for index, width in enumerate(widths)
    ]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """A number for a table; a dash for None and NaN."""
    if value is None or value != value:
        return MISSING
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def perplexity(value: float | None) -> str:
    """A perplexity: two decimals, none where they would say nothing."""
    if value is None or value < 1000:
        return number(value)
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return MISSING if value is None else f"{100 * value:.1f}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = []
    for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
        space = " " * (width - _width(cell))
        cells.append(cell + space if index == 0 else space + cell)
    return "| " + " | ".join(cells) + " |"


def _width(text: str) -> int:
    """Columns a terminal takes for a text."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
