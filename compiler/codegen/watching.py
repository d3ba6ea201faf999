"""Watch what instructions compute: the same list, with a call after each value that reports it.

    y = _exp(x)               y = _exp(x)
                       ->     _watch(7, y)

A value is numbered by its place: first the inputs, then each instruction. `Flow` says which places
a value comes from, through buckets, handles and what graphs save for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from meshwright.compiler.codegen.instructions import (
    Arrive,
    BucketView,
    Call,
    Constant,
    Exchange,
    Free,
    Instruction,
    Instructions,
    Move,
    Pause,
    Return,
    Save,
    Start,
    Take,
    UnderWay,
    Value,
    Wait,
    reads,
    target,
)
from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.graph.ir import INPUT, SAVED, TO_DEVICE, Node

Place: TypeAlias = tuple[int, int]
"""A graph, by its place in the list of a program, and a value in it, by its number."""
Watch: TypeAlias = Callable[[int, Any], None]
"""Told the number of a value, and the value."""


def watched(instructions: Instructions, watch: Callable[[RankContext], Watch]) -> Instructions:
    """The instructions, which tell `watch` of every value as soon as it is there."""
    function = Constant("_watch", watch)
    totals = _totals(instructions)
    body: list[Instruction] = [
        Call(None, function, (number, value), {}, node)
        for number, (value, node) in enumerate(instructions.inputs.items())
    ]
    for number, each in enumerate(instructions.body, len(instructions.inputs)):
        body.append(each)
        value = _seen(each, totals)
        if value is not None:
            body.append(Call(None, function, (number, value), {}, _node(each)))
    return replace(instructions, body=tuple(body))


@dataclass
class Flow:
    """Where the values of a list of graphs come from; `stages` has the number of each one's stage,
    and `sent`, by place among its results, what it makes for other stages: kind and name.

    `ends` are what graphs return and write into buckets, and `given` what is sent to other ranks.
    """

    graphs: tuple[Instructions, ...]
    stages: tuple[int, ...]
    sent: tuple[Mapping[int, tuple[str, str]], ...]
    sources: dict[Place, list[Place]] = field(default_factory=dict)
    nodes: dict[Place, Node] = field(default_factory=dict)
    received: set[Place] = field(default_factory=set)
    """What came from other ranks."""
    ends: list[Place] = field(default_factory=list)
    given: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._saved: dict[tuple[int, int], list[Place]] = {}
        self._taken: list[tuple[tuple[int, int], Place]] = []
        self._passed: dict[tuple[str, str], list[Place]] = {}
        self._away: set[Place] = set()
        for graph, instructions in enumerate(self.graphs):
            self._walk(graph, instructions)
        for number, place in self._taken:
            self.sources[place] = self._saved.get(number, [])
        for place, found in self.sources.items():
            # What is elsewhere when a graph takes it cannot be looked at there.
            away = (before for each in found if each in self._away for before in self.sources[each])
            self.sources[place] = [*found, *away]
        for place in self.received:
            if self.nodes[place].op == INPUT:
                self.sources[place] = self._passed[self.nodes[place].args]

    def _walk(self, graph: int, instructions: Instructions) -> None:
        stage, totals = self.stages[graph], _totals(instructions)
        made: dict[Value, list[Place]] = {}
        for number, (variable, node) in enumerate(instructions.inputs.items()):
            made[variable], self.nodes[graph, number] = [(graph, number)], node
            if not node.held:
                self.received.add((graph, number))
        for number, each in enumerate(instructions.body, len(instructions.inputs)):
            place = (graph, number)
            match each:
                case Save(values):
                    for saved, handed in values:
                        self._saved.setdefault((stage, saved), []).extend(made.get(handed, ()))
                case Return(results, reductions):
                    for at, result in enumerate((*results, *reductions)):
                        returned = result.handle if isinstance(result, UnderWay) else result
                        found = made.get(returned, [])
                        if at in self.sent[graph]:
                            self._passed[self.sent[graph][at]] = found
                            self.given += found
                        else:
                            self.ends += found
                case Start(handle, exchange):
                    made[handle] = made.get(exchange.source, [])
                case Move(handle, source, node):
                    made[handle] = made.get(source, [])
                    if node.op == TO_DEVICE:
                        self._away.update(p for p in made[handle] if self.nodes[p].op == SAVED)
                case Arrive(target, handle):
                    made[target] = made.get(handle, [])
                case Take(variable, saved) if variable not in totals:
                    self._taken.append(((stage, saved), place))
            value = _seen(each, totals)
            if value is None:
                continue
            self.nodes[place] = _node(each)
            read = [given for given in reads(each) if given != value]
            found = [source for given in read for source in made.get(given, ())]
            self.sources[place] = found
            if isinstance(each, (Exchange, Wait)):
                self.received.add(place)
                self.given += found
            if value in totals:
                self._saved.setdefault((stage, totals[value]), []).append(place)
            if isinstance(value, BucketView):
                self.ends.append(place)
            made[value] = [place]


def _made(each: Instruction) -> Value | None:
    """What an instruction gives a value; a call without a target adds to its first operand."""
    if isinstance(each, Call) and _adds(each):
        total: Value = each.args[0]
        return total
    return target(each)


def _totals(instructions: Instructions) -> dict[Value, int]:
    """The totals that a graph adds to, and the numbers under which it was handed them."""
    added = {_made(each) for each in instructions.body if _adds(each)}
    return {
        each.target: each.number
        for each in instructions.body
        if isinstance(each, Take) and each.target in added
    }


def _adds(each: Instruction) -> bool:
    return isinstance(each, Call) and each.target is None and each.out is None


def _seen(each: Instruction, totals: Mapping[Value, int]) -> Value | None:
    """What an instruction gives a value that can be looked at: a handle has none yet, what has
    moved was looked at before, and a total holds anything before the first value is added."""
    value = _made(each)
    moves = isinstance(each, (Start, Move, Arrive))
    hidden = moves or (isinstance(each, Take) and value in totals)
    return None if hidden else value


def _node(each: Instruction) -> Node:
    assert not isinstance(each, (Pause, Free, Save, Return))
    return each.node
