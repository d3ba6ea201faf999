"""Tables in a terminal, and as plain text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.compiler.graph.text import spelt
from meshwright.compiler.report.sheet import Sheet, broken

WIDTH = 80
"""Columns of the text that does not go to a terminal."""
_WIDEST = 1000
"""Columns for rich: a name that cannot be broken is wider than the terminal, not cut off."""


def print_whole(console: Console, found: RenderableType) -> None:
    """Print what is wider than a terminal too, in characters that it has."""
    text = plain(found)
    if spelt(text, console.encoding) != text:
        console.out(spelt(text, console.encoding), highlight=False)
        return
    console.print(found, width=_WIDEST, crop=False, no_wrap=True, overflow="ignore")


def sheet_text(sheet: Sheet, width: int = WIDTH) -> str:
    """One table, without its title, as plain text."""
    return plain(table(sheet, width))


def plain(renderable: RenderableType) -> str:
    """The text of what rich prints, without colours or trailing blanks."""
    console = Console(file=io.StringIO(), width=_WIDEST, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def table(sheet: Sheet, width: int) -> Table:
    """A table made to fit `width` columns, without its title."""
    headed = any(column.heading for column in sheet.columns)
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=headed)
    widths = sheet.widths(width)
    for column, size in zip(sheet.columns, widths, strict=True):
        found.add_column(
            column.heading,
            style=column.style or None,
            justify="right" if column.right else "left",
            width=size,
            no_wrap=True,
            header_style="dim",
        )
    for i, row in enumerate((*sheet.rows, *sheet.totals)):
        style = "" if i < len(sheet.rows) else "bold" if i == len(sheet.rows) else "dim"
        cells = (broken(cell, size) for cell, size in zip(row, widths, strict=True))
        found.add_row(*map(Text, cells), style=style)
    return found
