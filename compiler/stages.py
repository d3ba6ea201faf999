"""Stages of a program, and the schedule in which ranks run them.

A stage is what runs without waiting for another stage: one graph for each phase. A program is its
stages and a table from ranks to actions. Where a model is not cut into stages there is one, and
every rank runs its forward, then its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import (
    INPUT,
    SAVED,
    Graph,
    InputKind,
    Node,
    Output,
    OutputKind,
    Phase,
)


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
    def trains(self) -> bool:
        """Whether the stage has a backward."""
        return len(self.graphs) > 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that the stage computes with."""
        inputs = self.forward.inputs
        return tuple(n.args[1] for n in inputs if n.args[0] == InputKind.PARAMETER)

    def map(self, function: Callable[[Graph], Graph]) -> Stage:
        """The stage with each graph replaced by what `function` makes of it."""
        return replace(self, graphs={phase: function(each) for phase, each in self.graphs.items()})

    def received(self, phase: Phase) -> tuple[Node, ...]:
        """The inputs that come from other stages: activations of a forward, cotangents of a
        backward."""
        return tuple(n for n in self.graphs[phase].inputs if not n.held)

    def sent(self, phase: Phase) -> tuple[Output, ...]:
        """The outputs for other stages: activations of a forward, cotangents of a backward."""
        return self.graphs[phase].outputs_of(OutputKind.SENT, OutputKind.COTANGENT)


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a schedule: run the graph of phase `kind` of a stage on one microbatch."""

    kind: Phase
    stage: int
    microbatch: int = 0

    def __str__(self) -> str:
        """`forward 0` or, of a microbatch other than the first, `forward 0 of microbatch 2`."""
        text = f"{self.kind.value} {self.stage}"
        return f"{text} of microbatch {self.microbatch}" if self.microbatch else text


PASSED_AS = {
    OutputKind.SENT: InputKind.RECEIVED,
    OutputKind.COTANGENT: InputKind.COTANGENT,
}
"""What the output of one stage is to the stage that takes it, under the same name."""

Schedule: TypeAlias = "Mapping[int, tuple[Action, ...]]"
"""The actions of each rank, in the order in which it runs them."""


def same_on_every_rank(stages: Iterable[Stage], num_ranks: int) -> Schedule:
    """The schedule in which each rank runs every graph of every stage: forwards, then, from the
    last stage to the first, what follows."""
    listed = list(stages)
    forwards = [Action(Phase.FORWARD, stage.number) for stage in listed]
    later = [
        Action(phase, stage.number)
        for stage in reversed(listed)
        for phase in stage.graphs
        if phase is not Phase.FORWARD
    ]
    return dict.fromkeys(range(num_ranks), (*forwards, *later))


def check_schedule(stages: Sequence[Stage], schedule: Schedule) -> None:
    """Raises `PassError` for an action without a graph, for one that takes what no earlier action
    of its rank has made, and for one that makes what another has made: nothing adds up the losses
    and gradients of microbatches, or of two stages that share a parameter."""
    graphs = {
        (each.number, phase): graph for each in stages for phase, graph in each.graphs.items()
    }
    for actions in dict.fromkeys(schedule.values()):
        made: set[object] = set()
        for action in actions:
            graph = graphs.get((action.stage, action.kind))
            if graph is None:
                raise _misplaced(action, "has no graph")
            for kind, *value in _taken(graph, action):
                if (kind, *value) not in made:
                    raise _misplaced(action, f"takes {kind} `{value[0]}` before it is made")
            for kind, *value in _made(graph, action):
                if (kind, *value) in made:
                    raise _misplaced(action, f"makes {kind} `{value[0]}` once more")
                made.add((kind, *value))


def _misplaced(action: Action, what: str) -> PassError:
    return PassError(f"`{action}` in the schedule {what}", help="report this: it is a bug")


def _taken(graph: Graph, action: Action) -> Iterator[tuple[Any, ...]]:
    """What an action takes that other actions make: kind, name, microbatch and, if saved, stage."""
    for node in graph.nodes:
        if node.op == SAVED:
            yield OutputKind.SAVED, str(node.args[0]), action.microbatch, action.stage
        elif node.op == INPUT and not node.held:
            yield *node.args, action.microbatch


def _made(graph: Graph, action: Action) -> Iterator[tuple[Any, ...]]:
    """What an action makes, in the same terms; results of a step have no microbatch."""
    for output in graph.outputs:
        if output.kind is OutputKind.SAVED:
            yield output.kind, output.name, action.microbatch, action.stage
        elif output.kind in PASSED_AS:
            yield PASSED_AS[output.kind], output.name, action.microbatch
        else:
            yield output.kind, output.name
