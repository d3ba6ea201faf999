"""What `show` prints: the mesh, layouts, collectives, bytes and memory of a program, as tables."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.compiler.graph.text import spelt
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.sheets import Sheet, broken, heading, sheets
from meshwright.compiler.report.summary import Summary, summarise
from meshwright.dsl.writing.html import html_table

WIDTH = 80
"""Columns of the text that does not go to a terminal."""
_WIDEST = 1000
"""Columns for rich: a name that cannot be broken is wider than the terminal, not cut off."""


def show(program: Compiled, *, local: bool = False, console: Console | None = None) -> None:
    """Print a program's tables; with `local`, with the shapes that one rank holds."""
    console = console or Console()
    print_whole(console, tables(summarise(program, local=local), console.width))


def print_whole(console: Console, found: RenderableType) -> None:
    """Print what is wider than a terminal too, in characters that it has."""
    text = plain(found)
    if spelt(text, console.encoding) != text:
        console.out(spelt(text, console.encoding), highlight=False)
        return
    console.print(found, width=_WIDEST, crop=False, no_wrap=True, overflow="ignore")


def show_text(program: Compiled, *, local: bool = False, width: int = WIDTH) -> str:
    """What `show` prints, as plain text: the same program, the same text."""
    return plain(tables(summarise(program, local=local), width))


def show_html(program: Compiled) -> str:
    """What `show` prints, as tables of a notebook."""
    summary = summarise(program)
    found = [html_table([""], [[line] for line in heading(summary)])]
    for sheet in sheets(summary):
        columns = [column.heading for column in sheet.columns]
        right = "".join("r" if column.right else " " for column in sheet.columns)
        rows = (*sheet.rows, *sheet.totals)
        found.append(html_table(columns, rows, title=sheet.title, right=right))
    return f"<div>{''.join(found)}</div>"


def sheet_text(sheet: Sheet, width: int = WIDTH) -> str:
    """One table, without its title, as plain text."""
    return plain(_table(sheet, width))


def plain(renderable: RenderableType) -> str:
    """The text of what rich prints, without colours or trailing blanks."""
    console = Console(file=io.StringIO(), width=_WIDEST, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def tables(summary: Summary, width: int = WIDTH) -> RenderableType:
    """All tables, in reading order, made to fit `width` columns."""
    parts: list[RenderableType] = [_head(summary, width)]
    for sheet in sheets(summary):
        parts += [Text(f"\n{sheet.title}", "bold"), _table(sheet, width)]
    return Group(*parts, Text(""))


def _head(summary: Summary, width: int) -> Text:
    text = Text("\n".join(broken(line, width) for line in heading(summary)))
    text.highlight_words([summary.model, summary.plan], "bold")
    return text


def _table(sheet: Sheet, width: int) -> Table:
    headed = any(column.heading for column in sheet.columns)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=headed)
    widths = sheet.widths(width)
    for column, size in zip(sheet.columns, widths, strict=True):
        table.add_column(
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
        table.add_row(*map(Text, cells), style=style)
    return table
