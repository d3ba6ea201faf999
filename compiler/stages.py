"""Stages of a program, and the schedule in which ranks run them.

A stage is what runs without waiting for another stage: one graph for each phase. A program is its
stages and a table from ranks to actions. A model that is not cut has one stage, of which every rank
runs the forward, then the backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from meshwright.compiler.errors import PassError
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
from meshwright.compiler.layout.mesh import Mesh


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
        joined = self.joined
        saved = [int(each.name) for each in self.graphs[phase].outputs_of(OutputKind.SAVED)]
        return tuple(number for number in saved if number in joined and joined[number].adds)

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


def same_on_every_rank(stages: Iterable[Stage], mesh: Mesh) -> Schedule:
    """The schedule in which every rank runs all graphs of all stages.

    For each microbatch in turn: every forward, then, from the last stage to the first, the
    backward and the weight gradients. Counts of all microbatches and what runs once come before
    the first, or after the last.
    """
    listed, turns = list(stages), range(len(mesh.turns))
    first = [Action(Phase.COUNT, s.number, i) for s in listed for i in turns]
    first += [Action(Phase.BEFORE, s.number) for s in listed]
    later = (Phase.BACKWARD, Phase.WEIGHT)
    looped = [
        action
        for i in turns
        for action in (
            *(Action(Phase.FORWARD, s.number, i) for s in listed),
            *(Action(phase, s.number, i) for s in reversed(listed) for phase in later),
        )
    ]
    last = [Action(Phase.AFTER, s.number) for s in reversed(listed)]
    graphs = {(s.number, phase) for s in listed for phase in s.graphs}
    actions = tuple(a for a in (*first, *looped, *last) if (a.stage, a.kind) in graphs)
    return dict.fromkeys(range(mesh.num_ranks), actions)


def check_schedule(stages: Sequence[Stage], schedule: Schedule) -> None:
    """Check that each action has a graph, takes what earlier actions of its rank have made, and
    makes nothing again: losses and gradients of multiple microbatches, or of two stages that share
    a parameter, are not added up. Raises `PassError`."""
    numbered = {stage.number: stage for stage in stages}
    for actions in dict.fromkeys(schedule.values()):
        made: set[object] = set()
        turns = range(1 + max((action.microbatch for action in actions), default=0))
        for action in actions:
            stage = numbered[action.stage]
            if action.kind not in stage.graphs:
                raise _misplaced(action, "has no graph")
            for kind, *value in _taken(stage, action):
                if (kind, *value) not in made:
                    raise _misplaced(action, f"takes {kind} `{value[0]}` before it is made")
            for kind, *value in _made(stage, action, turns):
                if (kind, *value) in made:
                    raise _misplaced(action, f"makes {kind} `{value[0]}` once more")
                made.add((kind, *value))


def _misplaced(action: Action, what: str) -> PassError:
    return PassError(f"`{action}` in the schedule {what}", help="report this: it is a bug")


def _taken(stage: Stage, action: Action) -> Iterator[tuple[Any, ...]]:
    """The values of other actions that an action takes: kind, name, microbatch and, if saved,
    stage."""
    for node in stage.received(action.kind):
        yield *node.args, action.microbatch
    for node in stage.graphs[action.kind].nodes:
        if node.op == SAVED:
            yield OutputKind.SAVED, str(node.args[0]), action.microbatch, stage.number


def _made(stage: Stage, action: Action, turns: Iterable[int]) -> Iterator[tuple[Any, ...]]:
    """The values that an action makes, in the same terms; results of a step have no microbatch."""
    for output in stage.sent(action.kind):
        yield PASSED_AS[output.kind], output.name, action.microbatch
    for output in stage.graphs[action.kind].outputs:
        if output.kind is OutputKind.SAVED:
            for microbatch in turns if action.kind.once else (action.microbatch,):
                yield output.kind, output.name, microbatch, stage.number
        elif output.kind not in PASSED_AS:
            yield output.kind, output.name
