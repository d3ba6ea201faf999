"""A program on its way through the passes: its graph, and what the plan says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TypeAlias

import torch

from meshwright.compiler.capture.capture import Captured
from meshwright.compiler.graph.ir import Graph, Node
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.movement import Movement
from meshwright.compiler.program import Budgeted, Kept, Shared
from meshwright.compiler.report.memory.holding import Memory
from meshwright.compiler.schedules.balanced import Balance
from meshwright.compiler.stages import Stage
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Checkpoint, Context, Offload, Statement


@dataclass(frozen=True, slots=True)
class Pin:
    """A layout, and the statements of the plan that say so, each of some dims."""

    layout: Layout
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Modules between whose split linears activations are split along the sequence."""

    modules: frozenset[str]
    axes: tuple[str, ...]
    statement: Statement
    keep_gathered: bool = False
    """Whether what is gathered is saved for the backward instead of gathered again."""


@dataclass(frozen=True, slots=True)
class Attending:
    """Modules whose attention works on sequences that are split over the statement's axes."""

    modules: frozenset[str]
    statement: Context


Call: TypeAlias = tuple[str, tuple[int, ...]]
"""A call of a module: its path, and the numbers of this call and of those around it."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpointed:
    """A region that the backward computes again: one call of a module or, if it is `joined`,
    several. `name` is a selector of its modules."""

    name: str
    statement: Checkpoint
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Movable:
    """A parameter that statements would have kept elsewhere: its `value` with all else, or only its
    gradient and what an optimizer keeps of it, its `update`. The plan's `layer` has it."""

    layer: str
    value: Offload | None = None
    update: Offload | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """The data that every pass takes and returns; none of them edits one in place."""

    plan: Plan
    mesh: Mesh
    captured: Captured
    graph: Graph
    modules: tuple[str, ...] = ()
    """The qualified names of all modules of the model but the root."""
    shared: tuple[Shared, ...] = ()
    """The layers that share parameters."""
    mixtures: tuple[str, ...] = ()
    """The names of the modules that are mixtures of experts."""
    inputs: Mapping[str, Pin] = field(default_factory=dict)
    """Layouts in which operators use parameters, buffers and arguments, by `input_key`. One dim may
    be longer than the tensor's until `pad` has padded it."""
    stored: Mapping[str, Pin] = field(default_factory=dict)
    """Layouts in which ranks store parameters and buffers, by name, where operators use them in
    others. One dim may be longer than the tensor's: what is added are zeros that nothing sees."""
    zero: Mapping[str, int] = field(default_factory=dict)
    """By parameter that is stored split over ranks which use it whole: the level of `zero` that
    gathers it and scatters its gradient as often."""
    movable: Mapping[str, Movable] = field(default_factory=dict)
    """By parameter: what statements would have kept elsewhere."""
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """By parameter of which something is kept elsewhere; of a variant, as the program has it."""
    values: Mapping[Node, Pin] = field(default_factory=dict)
    """Layouts of activations, by the node that computes them."""
    entering: Mapping[Node, tuple[tuple[Node, Pin], ...]] = field(default_factory=dict)
    """By the first node inside a module: layouts of the values that enter there."""
    regions: tuple[Region, ...] = ()
    attending: tuple[Attending, ...] = ()
    notes: Mapping[Statement, str] = field(default_factory=dict)
    """What was decided for a statement that leaves it open, and why."""
    checkpoints: Mapping[Call, Checkpointed] = field(default_factory=dict)
    """By call of a module: the region that it is, or is part of."""
    budgeted: Budgeted | None = None
    """What was chosen to be computed again, where the plan only has a budget."""
    price: Callable[[Draft], Mapping[int, Memory]] | None = None
    """What ranks need to hold, by their place along the pipeline, under a draft with its stages or
    whose joint graph is about to be separated."""
    device: torch.device | None = None
    """That of the ranks."""
    quick: bool = False
    """Whether to give up early where a budget cannot be kept."""
    balance: Balance | None = None
    """What the stages were chosen by, where the plan only says how many there are."""
    num_stages: int = 1
    """The number of stages that the forward is cut into."""
    holders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By parameter and buffer that stages use: those that hold it. Every stage holds any other."""
    movements: tuple[Movement, ...] = ()
    """Every change of layout that was inserted, in the forward and in the backward."""
    variant_of: tuple[str, ...] | None = None
    """For a variant of a program, in another mode or for other inputs: that program's inputs. What
    statements say of inputs and modules that are not used here has no effect."""
    held: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """For a variant: the `holders` of that program, whose ranks keep what they hold."""
    evaluation: Callable[[], Graph | None] = lambda: None
    """Captures the model's eval mode, for modules that only run there; None if that fails."""
    stages: tuple[Stage, ...] = ()
    """The graphs that run, once forward and backward are apart; `graph` is what they were."""

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The graphs of the program: one until forward and backward are apart."""
        parts = tuple(graph for stage in self.stages for graph in stage.graphs.values())
        return parts or (self.graph,)


def on_graph(function: Callable[[Graph], Graph]) -> Callable[[Draft], Draft]:
    """A pass over drafts that applies `function`, which reads no plan, to their graph."""

    @wraps(function)
    def run(draft: Draft) -> Draft:
        return replace(draft, graph=function(draft.graph))

    return run


def with_graph(
    draft: Draft, graph: Graph, mapping: Mapping[Node, Node], first: Mapping[Node, Node]
) -> Draft:
    """`draft` with another graph and the layouts of activations in it: `mapping` has what stands
    for each node of the old one, and `first` the first of the nodes that compute that."""
    return replace(
        draft,
        graph=graph,
        values={mapping[node]: pin for node, pin in draft.values.items()},
        entering={
            first[node]: tuple((mapping[value], pin) for value, pin in pins)
            for node, pins in draft.entering.items()
        },
    )


def device_type(draft: Draft) -> str:
    """The type of the ranks' devices."""
    return draft.device.type if draft.device else "cpu"


def pinned_inputs(draft: Draft, graph: Graph) -> frozenset[Node]:
    """The inputs of `graph` that the plan laid out or, where they are stored in another layout, the
    nodes that bring them to the plan's."""
    found: set[Node] = set()
    for node in graph.nodes:
        source = input_behind(node)
        pin = draft.inputs.get(input_key(source)) if source else None
        if pin and node.placed == pin.layout.canonical(draft.mesh):
            found.add(node)
    return frozenset(found)


def input_key(node: Node) -> str:
    """An input's name, after its kind where the model does not hold it: an argument may have the
    name of a parameter."""
    kind, name = node.args[:2]
    return str(name) if node.of_model else f"{kind} {name}"
