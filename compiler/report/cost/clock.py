"""Walk the instructions of a graph with a clock: what one rank computes, and what it waits for.

A link of a rank carries one message after another, beside what the rank computes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from meshwright.compiler.codegen.instructions import (
    Arrive,
    Call,
    Copy,
    Exchange,
    Instruction,
    Instructions,
    Move,
    Pause,
    Rearrange,
    Return,
    Start,
    UnderWay,
    Value,
    Wait,
)
from meshwright.compiler.costs.prices import Lane, Prices
from meshwright.compiler.graph.aliasing import is_view


@dataclass(frozen=True, slots=True)
class GraphTime:
    """How long one run of a graph takes: `seconds`.

    `computing` is what its operators take, and `waiting` what it waits for messages besides. Those
    that are still under way at its end take `left` more. `sending` is how long the links carry its
    messages, by the axes that they go over.
    """

    seconds: float
    computing: float
    waiting: float
    left: float
    sending: dict[str, float]


def graph_time(instructions: Instructions, prices: Prices) -> GraphTime:
    """The time of a graph on a rank that nothing else keeps waiting."""
    clock = _Clock(prices)
    for each in instructions.body:
        clock.run(each)
    waiting = clock.now - clock.computing
    return GraphTime(clock.now, clock.computing, waiting, clock.left, dict(clock.sending))


@dataclass
class _Clock:
    prices: Prices
    now: float = 0.0
    computing: float = 0.0
    left: float = 0.0
    sending: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    free: dict[Lane, float] = field(default_factory=dict)
    """When each link has carried what was given to it."""
    ends: dict[Value, float] = field(default_factory=dict)
    """By handle: when a message has arrived."""

    def run(self, each: Instruction) -> None:
        """Let one instruction run."""
        match each:
            case Call(node=node):
                self._compute(self.prices.operator(node))
            case Copy(node=node):
                self._compute(self.prices.copy(node))
            case Rearrange(node=node):
                self._compute(0.0 if is_view(node.op) else self.prices.copy(node))
            case Exchange():
                self._await(self._begin(each), each)
            case Start(handle, exchange):
                self.ends[handle] = self._begin(exchange)
            case Wait(handle, exchange):
                self._await(self.ends.pop(handle), exchange)
            case Move(handle, _, node):
                self.ends[handle] = self._carry("host", "host", self.prices.move(node))
            case Arrive(handle=handle):
                self.now = max(self.now, self.ends.pop(handle))
            case Pause():
                # The rank runs other graphs meanwhile, which take longer than what is under way.
                self.ends = {handle: min(end, self.now) for handle, end in self.ends.items()}
                self.free.clear()
            case Return(results, reductions):
                handles = [r.handle for r in (*results, *reductions) if isinstance(r, UnderWay)]
                self.left = max([0.0, *(self.ends[handle] - self.now for handle in handles)])
            case _:
                pass

    def _compute(self, seconds: float) -> None:
        self.now += seconds
        self.computing += seconds

    def _begin(self, exchange: Exchange) -> float:
        """Pack and give a message to its link. Returns when it has arrived."""
        node = exchange.node
        if exchange.before:
            self._compute(sum(map(self.prices.copy, node.args)))
        axes = node.kwargs["axes"]
        seconds = self.prices.collective(node)
        return self._carry(self.prices.lane(axes), ", ".join(axes), seconds)

    def _carry(self, lane: Lane, name: str, seconds: float) -> float:
        end = max(self.now, self.free.get(lane, 0.0)) + seconds
        self.sending[name] += seconds
        self.free[lane] = end
        return end

    def _await(self, end: float, exchange: Exchange) -> None:
        self.now = max(self.now, end)
        if exchange.after:
            self._compute(self.prices.copy(exchange.node))
