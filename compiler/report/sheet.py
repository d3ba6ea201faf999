"""Tables as rows of text, before they are laid out for a terminal or a notebook."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NARROWEST = 12
"""The least width to which a column is narrowed."""
_BREAKS = re.compile(r"(?<=\s)|(?<=,)(?!\s)|(?=\.)")
"""Where a cell may be broken: after blanks and commas, and before a name's dots."""
_WORDS = re.compile(r"(?<=\s)")
_NAMES = re.compile(r"(?=\.)")
_ITEMS = re.compile(r"(?<=, )")


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, a style of rich's, and how cells are laid out."""

    heading: str
    style: str = ""
    right: bool = False
    fixed: bool = False
    """Whether no cell is ever broken; those aligned to the right never are."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: rows, then rows that sum them up."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    totals: tuple[tuple[str, ...], ...] = ()

    def widths(self, width: int) -> list[int]:
        """The widths of the columns: the table fits `width` if its cells can be broken so far."""
        every = [tuple(column.heading for column in self.columns), *self.rows, *self.totals]
        natural = [max(map(len, cells)) for cells in zip(*every, strict=True)]
        least = [
            natural[i] if column.right or column.fixed else max(map(_narrowest, cells))
            for i, (column, cells) in enumerate(
                zip(self.columns, zip(*every, strict=True), strict=True)
            )
        ]
        room = width - 2 * (len(natural) - 1)
        found = list(natural)
        while sum(found) > room:
            widest = max(range(len(found)), key=lambda i: found[i] if found[i] > least[i] else 0)
            if found[widest] <= least[widest]:
                break
            found[widest] -= 1
        return found


def _narrowest(cell: str) -> int:
    pieces = [len(piece.rstrip()) for piece in _BREAKS.split(cell)]
    return max(min(len(cell), _NARROWEST), pieces[0], *(2 + piece for piece in pieces[1:]), 0)


def broken(cell: str, width: int) -> str:
    """A cell in lines of at most `width` columns, the later ones indented.

    A list is broken between its items, and an item only where it does not fit a line of its own.
    """
    lines = [""]
    pieces = [cell]
    for breaks in (_ITEMS, _WORDS, _NAMES, _BREAKS):
        pieces = [
            part
            for piece in pieces
            for part in ([piece] if len(piece.rstrip()) <= width - 2 else breaks.split(piece))
        ]
    for piece in pieces:
        if lines[-1].strip() and len(lines[-1] + piece.rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
