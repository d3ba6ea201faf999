"""Statements and comments to lines, in the order in which they were written."""

from __future__ import annotations

from collections.abc import Sequence

from lark import Token

from meshwright.dsl.printer import Line, cells
from meshwright.dsl.source import Source
from meshwright.dsl.statements import Statement


def arrange(
    statements: Sequence[Statement], comments: Sequence[Token], source: Source
) -> list[Line]:
    """The lines of a plan: a comment stays at the end of its line, or alone above the next."""
    own = [each for each in statements if each.span is not None and each.span.source == source]
    ends = {each.span.last_line: each for each in own if each.span is not None}
    trailing = {token.line: str(token) for token in comments if token.line in ends}
    placed: list[tuple[int, int, Line]] = []
    for token in comments:
        if token.line not in ends:
            line = token.line or 1
            placed.append((line, line, Line(comment=str(token).rstrip())))
    for each in own:
        assert each.span is not None
        comment = trailing.get(each.span.last_line, "").rstrip()
        placed.append((each.span.line, each.span.last_line, Line(cells(each), comment)))
    placed.sort(key=lambda item: item[0])
    _keep_paragraphs(placed, source)
    others = [Line(cells(each)) for each in statements if each not in own]
    return [line for _, _, line in placed] + others


def _keep_paragraphs(placed: list[tuple[int, int, Line]], source: Source) -> None:
    """Mark the lines that had a blank line before them."""
    texts = source.text.split("\n")
    for start, _, line in placed:
        line.blank_before = 2 <= start <= len(texts) + 1 and not texts[start - 2].strip()
