"""The instructions of a step as a list, with a bar beside what runs during each collective.

stage0.backward
  receive transfer_1: transfer[pp] from stage 1
  mm
┌ start all_reduce_1: all_reduce[dp]
│ mm_1
└ wait all_reduce_1

What stages send one another is received before a graph runs, and sent behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from meshwright.compiler.codegen.instructions import (
    Arrive,
    Call,
    Copy,
    Exchange,
    Instructions,
    Move,
    Pause,
    Rearrange,
    Return,
    Start,
    UnderWay,
    Wait,
)
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.graph.text import op_text
from meshwright.compiler.program import Compiled

_Event: TypeAlias = "tuple[str, Call | Copy | Rearrange | Exchange | Node | None]"
"""`run`, `exchange`, `start`, `wait` or `return`, and what that is done to, a node where
no other rank takes part; or `pause`."""


def timeline(program: Compiled) -> str:
    """The text of the instructions of every graph, in the order in which they run."""
    moves = _moves(program)
    return "\n\n".join(
        "\n".join((each.name, *_Lines(each, moves.get(each.name, ()))))
        for each in program.instructions
    )


def timeline_data(program: Compiled) -> dict[str, list[dict[str, object]]]:
    """The same as plain dictionaries and lists, by graph."""
    moves = _moves(program)
    return {
        each.name: [
            *(move.data for move in moves.get(each.name, ()) if move.before),
            *(_event_data(*event) for event in _events(each)),
            *(move.data for move in moves.get(each.name, ()) if not move.before),
        ]
        for each in program.instructions
    }


@dataclass(frozen=True, slots=True)
class _Move:
    """A value that a graph takes from another stage, or gives to one; `axes` are none where both
    stages are on the same ranks, and nothing moves."""

    before: bool
    name: str
    stage: int
    axes: tuple[str, ...]

    @property
    def data(self) -> dict[str, object]:
        does = ("receive" if self.before else "send") if self.axes else "hand over"
        return {"does": does, "node": self.name, "stage": self.stage, "axes": list(self.axes)}

    def __str__(self) -> str:
        end = f"{'from' if self.before else 'to'} stage {self.stage}"
        if not self.axes:
            return f"{'take' if self.before else 'hand over'} {self.name} {end}"
        does = "receive" if self.before else "send"
        return f"{does} {self.name}: transfer[{', '.join(self.axes)}] {end}"


def _moves(program: Compiled) -> dict[str, tuple[_Move, ...]]:
    """By graph: what it takes from other stages and gives to them."""
    found: dict[str, tuple[_Move, ...]] = {}
    holders = program.table.holders
    for link, nodes in program.transfers.values.items():
        axes = () if holders[link.source] == holders[link.target] else program.pipeline
        taker = program.stages[link.target].graphs[link.target_phase].name
        maker = program.stages[link.source].graphs[link.source_phase].name
        for node in nodes:
            taken = _Move(True, node.args[1], link.source, axes)
            given = _Move(False, node.args[1], link.target, axes)
            found[taker] = (*found.get(taker, ()), taken)
            found[maker] = (*found.get(maker, ()), given)
    return found


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
            case Move(node=node):
                yield "start", node
            case Arrive(node=node):
                yield "wait", node.args[0]
            case Pause():
                yield "pause", None
            case Return(results, reductions):
                under_way = (r for r in (*results, *reductions) if isinstance(r, UnderWay))
                yield from (("return", result.exchange) for result in under_way)


def _event_data(what: str, each: Any) -> dict[str, object]:
    if each is None:
        return {"does": what}
    if isinstance(each, Node):
        return {"does": what, "node": each.name, "move": op_text(each.op)}
    found: dict[str, object] = {"does": what, "node": each.node.name}
    if isinstance(each, Exchange) and what in ("exchange", "start"):
        found |= {"wire": each.wire.kind, "axes": list(each.wire.axes)}
    return found


class _Lines:
    def __init__(self, instructions: Instructions, moves: tuple[_Move, ...]) -> None:
        self.instructions, self.moves = instructions, moves
        self.under_way: list[Exchange | Node | None] = []
        """By column of bars; a column that has become free is used again."""

    def __iter__(self) -> Iterator[str]:
        yield from (self._line(str(move)) for move in self.moves if move.before)
        for what, each in _events(self.instructions):
            name = _name(each) if each else "(other stages run)"
            if not isinstance(each, (Exchange, Node)):
                yield self._line(name)
            elif what == "exchange":
                yield self._line(f"{name}: {_way(each)}")
            elif what == "start":
                yield self._begin(each)
            else:
                text = f"wait {name}" if what == "wait" else f"return {name}, under way"
                yield self._end(each, text)
        yield from (self._line(str(move)) for move in self.moves if not move.before)

    def _begin(self, exchange: Exchange | Node) -> str:
        if None not in self.under_way:
            self.under_way.append(None)
        column = self.under_way.index(None)
        line = self._line(f"start {_name(exchange)}: {_way(exchange)}", column, "┌")
        self.under_way[column] = exchange
        return line

    def _end(self, exchange: Exchange | Node, text: str) -> str:
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


def _name(each: Call | Copy | Rearrange | Exchange | Node) -> str:
    return each.name if isinstance(each, Node) else each.node.name


def _way(each: Exchange | Node) -> str:
    """How a value travels: `all_reduce[dp]`, `to_host`."""
    if isinstance(each, Node):
        return op_text(each.op)
    return f"{each.wire.kind}[{', '.join(each.wire.axes)}]"
