"""What `show` prints: the mesh, layouts, collectives, bytes and memory of a program, as tables."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.text import Text

from meshwright.compiler.program import Compiled
from meshwright.compiler.report.sheet import broken
from meshwright.compiler.report.sheets import heading, sheets
from meshwright.compiler.report.summary import Summary, summarise
from meshwright.compiler.report.tables import WIDTH, plain, print_whole, table
from meshwright.dsl.writing.html import html_table


def show(program: Compiled, *, local: bool = False, console: Console | None = None) -> None:
    """Print a program's tables; with `local`, with the shapes that one rank holds."""
    console = console or Console()
    print_whole(console, tables(summarise(program, local=local), console.width))


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


def tables(summary: Summary, width: int = WIDTH) -> RenderableType:
    """All tables, in reading order, made to fit `width` columns."""
    parts: list[RenderableType] = [_head(summary, width)]
    for sheet in sheets(summary):
        parts += [Text(f"\n{sheet.title}", "bold"), table(sheet, width)]
    return Group(*parts, Text(""))


def _head(summary: Summary, width: int) -> Text:
    text = Text("\n".join(broken(line, width) for line in heading(summary)))
    text.highlight_words([summary.model, summary.plan], "bold")
    return text
