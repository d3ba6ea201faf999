"""Small HTML tables for notebooks, without scripts or style sheets, in the theme's own colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

LIMIT = 200
"""The most rows of a table; the last line counts the others."""
_LONGEST = 400
"""The most characters of a cell."""

_TABLE = "border-collapse:collapse;margin:0.4em 0;color:inherit;background:transparent"
_CELL = (
    "text-align:{align};vertical-align:top;padding:0.1em 0.8em 0.1em 0;"
    "color:inherit;background:transparent;border:none;font-family:monospace;white-space:pre-wrap"
)


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", right: str = ""
) -> str:
    """A table of escaped cells with at most `LIMIT` rows; a row of one cell spans all columns.

    `right` has an `r` for each column that is aligned to the right: `"  r "`.
    """
    rows = list(rows)
    lines = [f'<table style="{_TABLE}">']
    if title:
        align = "text-align:left;color:inherit;font-weight:bold;caption-side:top"
        lines.append(f'<caption style="{align}">{escape(title)}</caption>')
    if any(columns):
        lines.append(_row(columns, right, len(columns), tag="th"))
    lines += [_row(row, right, len(columns)) for row in rows[:LIMIT]]
    if len(rows) > LIMIT:
        lines.append(_row([f"… {len(rows) - LIMIT} more"], "", len(columns)))
    return "\n".join([*lines, "</table>"])


def html_text(text: str) -> str:
    """A preformatted text, escaped, with at most `LIMIT` lines."""
    lines = text.splitlines()
    if len(lines) > LIMIT:
        lines = [*lines[:LIMIT], f"… {len(lines) - LIMIT} more lines"]
    return f'<pre style="color:inherit;background:transparent">{escape(chr(10).join(lines))}</pre>'


def _row(cells: Sequence[str], right: str, width: int, tag: str = "td") -> str:
    wide = f' colspan="{width}"' if len(cells) == 1 and width > 1 else ""
    found = []
    for cell, mark in zip(cells, right.ljust(len(cells)), strict=False):
        style = _CELL.format(align="right" if mark == "r" else "left")
        text = cell if len(cell) <= _LONGEST else f"{cell[:_LONGEST]}…"
        found.append(f'<{tag}{wide} style="{style}">{escape(text)}</{tag}>')
    return f"<tr>{''.join(found)}</tr>"
