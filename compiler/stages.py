"""Stages of a program: what runs without waiting for another stage, one graph for each phase.

A program is its stages and a schedule. A model that is not cut has one stage, of which every rank
runs the forward, then the backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.compiler.graph.ir import (
    SAVED,
    Graph,
    InputKind,
    MeshOp,
    Node,
    Output,
    OutputKind,
    Phase,
)
from meshwright.compiler.graph.transfers import collective_kind, combines


@dataclass(frozen=True, slots=True)
class Joined:
    """How the values that a stage saves in all turns of a loop under one number become one."""

    node: Node
    """The reduction or gather over sequential axes that takes them."""
    phase: Phase
    """That of the graph in which it is."""
    place: tuple[Node, int] | None
    """The bucket, and the part of it, in which they are summed up; the graph would copy the sum
    there and do nothing else with it."""

    @property
    def gathers(self) -> bool:
        """Whether they are joined side by side, not summed up."""
        kind = collective_kind(self.node.op)
        return kind is not None and kind.gathers

    @property
    def adds(self) -> bool:
        """Whether they are added up, each where it is computed."""
        return not self.gathers and self.value.placed.reduction == "sum"

    @property
    def value(self) -> Node:
        """What is saved in a turn, as the graph after the loop takes it."""
        value: Node = self.node.args[0]
        return value


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a model: its graphs by phase, in the order in which they run.

    A stage without a graph of `Phase.WEIGHT` computes gradients of parameters in its backward.
    """

    number: int
    graphs: Mapping[Phase, Graph]

    @property
    def forward(self) -> Graph:
        """The graph of the forward, which every stage has."""
        return self.graphs[Phase.FORWARD]

    @property
    def joined(self) -> dict[int, Joined]:
        """By number of a saved value: how a graph that runs once takes those of all coordinates of
        the sequential axes as one."""
        found: dict[int, Joined] = {}
        for phase, graph in self.graphs.items():
            users = graph.users() if phase.once else {}
            for node, takers in users.items():
                if combines(node, graph.mesh) and node.args[0].op == SAVED:
                    alone = len(takers) == 1 and node not in graph.returned
                    bucket = takers[0] if alone and takers[0].op == MeshOp("bucket") else None
                    place = (bucket, bucket.args.index(node)) if bucket else None
                    found[node.args[0].args[0]] = Joined(node, phase, place)
        return found

    @property
    def trains(self) -> bool:
        """Whether the stage has a backward."""
        return Phase.BACKWARD in self.graphs

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that the stage computes with."""
        inputs = self.forward.inputs
        return tuple(n.args[1] for n in inputs if n.args[0] == InputKind.PARAMETER)

    def added(self, phase: Phase) -> tuple[int, ...]:
        """The numbers of the saved values of a graph that are added up over all turns of a loop."""
        return tuple(n for n, joined in self._joined_of(phase).items() if joined.adds)

    def left_to_join(self, phase: Phase) -> tuple[int, ...]:
        """The numbers of those that become one over all turns of a loop in another way."""
        return tuple(n for n, joined in self._joined_of(phase).items() if not joined.adds)

    def _joined_of(self, phase: Phase) -> dict[int, Joined]:
        saved = [int(each.name) for each in self.graphs[phase].outputs_of(OutputKind.SAVED)]
        joined = self.joined
        return {number: joined[number] for number in saved if number in joined}

    def received(self, phase: Phase) -> tuple[Node, ...]:
        """The inputs that come from other stages: activations of a forward, cotangents of a
        backward."""
        return tuple(n for n in self.graphs[phase].inputs if not n.held)

    def sent(self, phase: Phase) -> tuple[Output, ...]:
        """The outputs for other stages: activations of a forward, cotangents of a backward."""
        return self.graphs[phase].outputs_of(OutputKind.SENT, OutputKind.COTANGENT)


PASSED_AS = {
    OutputKind.SENT: InputKind.RECEIVED,
    OutputKind.COTANGENT: InputKind.COTANGENT,
}
"""What the output of one stage is to the stage that takes it, under the same name."""
