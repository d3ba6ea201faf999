"""The instructions of a step as a list, with a bar beside what runs during each collective.

stage0.backward
  mm
┌ start all_reduce_1: all_reduce[dp]
│ mm_1
└ wait all_reduce_1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

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

_Event: TypeAlias = "tuple[str, Call | Copy | Rearrange | Exchange]"
"""`run`, `exchange`, `start`, `wait` or `return`, and what that is done to."""


def timeline(graphs: Iterable[Instructions]) -> str:
    """The text of the instructions of every graph, in the order in which they run."""
    return "\n\n".join("\n".join((each.name, *_Lines(each))) for each in graphs)


def timeline_data(graphs: Iterable[Instructions]) -> dict[str, list[dict[str, object]]]:
    """The same as plain dictionaries and lists, by graph."""
    return {each.name: [_event_data(*event) for event in _events(each)] for each in graphs}


def _events(instructions: Instructions) -> Iterator[_Event]:
    for each in instructions.body:
        match each:
            case Call() | Copy() | Rearrange():
                yield "run", each
            case Exchange():
                yield "exchange", each
            case Start(exchange=exchange):
                yield "start", exchange
            case Wait(exchange=exchange):
                yield "wait", exchange
            case Return(results, reductions):
                under_way = (r for r in (*results, *reductions) if isinstance(r, UnderWay))
                yield from (("return", result.exchange) for result in under_way)


def _event_data(what: str, each: Call | Copy | Rearrange | Exchange) -> dict[str, object]:
    found: dict[str, object] = {"does": what, "node": each.node.name}
    if isinstance(each, Exchange) and what in ("exchange", "start"):
        found |= {"wire": each.wire.kind, "axes": list(each.wire.axes)}
    return found


class _Lines:
    def __init__(self, instructions: Instructions) -> None:
        self.instructions = instructions
        self.under_way: list[Exchange | None] = []
        """By column of bars; a column that has become free is used again."""

    def __iter__(self) -> Iterator[str]:
        for what, each in _events(self.instructions):
            name = each.node.name
            if not isinstance(each, Exchange):
                yield self._line(name)
            elif what == "exchange":
                yield self._line(f"{name}: {_wire(each)}")
            elif what == "start":
                yield self._begin(each)
            else:
                text = f"wait {name}" if what == "wait" else f"return {name}, under way"
                yield self._end(each, text)

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

    def _line(self, text: str, column: int = -1, mark: str = "") -> str:
        bars = [" " if each is None else "│" for each in self.under_way]
        if mark:
            bars[column] = mark
        return "".join(bars).ljust(3) + " " + text


def _wire(exchange: Exchange) -> str:
    return f"{exchange.wire.kind}[{', '.join(exchange.wire.axes)}]"
