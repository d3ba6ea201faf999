"""Statements and comments to lines, in the order in which they were written."""

from __future__ import annotations

from collections.abc import Sequence

from lark import Token

from meshwright.dsl.source import Source, Span
from meshwright.dsl.statements import Statement
from meshwright.dsl.writing.printer import Line, cells


def arrange(
    statements: Sequence[Statement], comments: Sequence[Token], source: Source
) -> list[Line]:
    """The lines of a plan.

    A comment at the end of a statement stays there; one inside a statement goes above it.
    Statements that are not in `source` come last.
    """
    written = [(each, each.span) for each in statements if _is_in(each.span, source)]
    trailing, above = _place_comments(comments, [span for _, span in written if span is not None])
    placed = [(line, Line(comment=text)) for line, text in above]
    for each, span in written:
        assert span is not None
        placed.append((span.line, Line(cells(each), trailing.get(span.last_line, ""))))
    placed.sort(key=lambda item: item[0])
    _keep_paragraphs(placed, source)
    rest = [Line(cells(each)) for each in statements if not _is_in(each.span, source)]
    return [line for _, line in placed] + rest


def _is_in(span: Span | None, source: Source) -> bool:
    return span is not None and span.source is source


def _place_comments(
    comments: Sequence[Token], spans: Sequence[Span]
) -> tuple[dict[int, str], list[tuple[int, str]]]:
    """Comments that end a statement, by its last line; the others, with the line they go above."""
    ends = {span.last_line for span in spans}
    inside = {line: span.line for span in spans for line in range(span.line, span.last_line)}
    trailing: dict[int, str] = {}
    above: list[tuple[int, str]] = []
    for token in comments:
        line, text = token.line or 1, str(token).rstrip()
        if line in ends:
            trailing[line] = text
        else:
            above.append((inside.get(line, line), text))
    return trailing, above


def _keep_paragraphs(placed: Sequence[tuple[int, Line]], source: Source) -> None:
    """Mark the lines that had a blank line before them."""
    texts = ["", *source.lines]
    before = 0
    for number, line in placed:
        line.blank_before = number > max(before, 1) and not texts[number - 1].strip()
        before = number
