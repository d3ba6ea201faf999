"""Plan text and places in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from lark import Token
from lark.tree import Meta

from meshwright.dsl.characters import normalised


@dataclass(frozen=True)
class Source:
    """A named text: a plan file, or the `__plan__` of a module class."""

    name: str
    text: str = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", normalised(self.text))

    @cached_property
    def lines(self) -> list[str]:
        """The lines without their ends."""
        return self.text.split("\n")

    def line(self, number: int) -> str:
        """Line `number`, counted from 1, without its end."""
        return self.lines[number - 1] if number <= len(self.lines) else ""


@dataclass(frozen=True, slots=True)
class Span:
    """Columns `column` to `end` (exclusive, counted from 1) of `line`.

    A span of multiple lines is shown up to the end of its first; `last_line` is its last.
    """

    source: Source = field(repr=False)
    line: int
    column: int
    end: int
    last_line: int

    @property
    def text(self) -> str:
        return self.source.line(self.line)[self.column - 1 : self.end - 1]

    @property
    def place(self) -> str:
        """`gpt.plan:6:45`."""
        return f"{self.source.name}:{self.line}:{self.column}"


def make_span(source: Source, start: tuple[int, int], end: tuple[int, int]) -> Span:
    """The span between two (line, column) places, cut at the end of its first line."""
    line, column = start
    last_line, end_column = end
    if last_line > line:
        end_column = len(source.line(line).partition("#")[0].rstrip()) + 1
    return Span(source, line, column, max(end_column, column + 1), last_line)


def token_span(source: Source, token: Token) -> Span:
    """Where a token stands."""
    line, column = token.line or 1, token.column or 1
    return make_span(source, (line, column), (token.end_line or line, token.end_column or column))


def tree_span(source: Source, meta: Meta) -> Span:
    """Where a parse tree that has at least one token stands."""
    return make_span(source, (meta.line, meta.column), (meta.end_line, meta.end_column))
