"""The instructions of a step as a list, with a bar beside what runs during each collective.

stage0.backward
  mm
┌ start all_reduce_1: all_reduce[dp]
│ mm_1
└ wait all_reduce_1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from meshwright.compiler.codegen.instructions import (
    Call,
    Copy,
    Exchange,
    Instructions,
    Rearrange,
    Return,
    Start,
    UnderWay,
    Wait,
)


def timeline(graphs: Iterable[Instructions]) -> str:
    """The text of the instructions of every graph, in the order in which they run."""
    return "\n\n".join("\n".join((each.name, *_Lines(each))) for each in graphs)


class _Lines:
    def __init__(self, instructions: Instructions) -> None:
        self.instructions = instructions
        self.under_way: list[Exchange | None] = []
        """By column of bars; a column that has become free is used again."""

    def __iter__(self) -> Iterator[str]:
        for each in self.instructions.body:
            match each:
                case Start(exchange=exchange):
                    yield self._begin(exchange)
                case Wait(exchange=exchange):
                    yield self._end(exchange, f"wait {exchange.node.name}")
                case Exchange():
                    yield self._line(f"{each.node.name}: {_wire(each)}")
                case Return():
                    yield from self._returned(each)
                case Call() | Copy() | Rearrange():
                    yield self._line(each.node.name)

    def _begin(self, exchange: Exchange) -> str:
        if None not in self.under_way:
            self.under_way.append(None)
        column = self.under_way.index(None)
        line = self._line(f"start {exchange.node.name}: {_wire(exchange)}", column, "┌")
        self.under_way[column] = exchange
        return line

    def _end(self, exchange: Exchange, text: str) -> str:
        column = self.under_way.index(exchange)
        line = self._line(text, column, "└")
        self.under_way[column] = None
        while self.under_way and self.under_way[-1] is None:
            self.under_way.pop()
        return line

    def _returned(self, returned: Return) -> Iterator[str]:
        for each in (*returned.results, *returned.reductions):
            if isinstance(each, UnderWay):
                yield self._end(each.exchange, f"return {each.exchange.node.name}, under way")

    def _line(self, text: str, column: int = -1, mark: str = "") -> str:
        bars = [" " if each is None else "│" for each in self.under_way]
        if mark:
            bars[column] = mark
        return "".join(bars).ljust(3) + " " + text


def _wire(exchange: Exchange) -> str:
    return f"{exchange.wire.kind}[{', '.join(exchange.wire.axes)}]"
