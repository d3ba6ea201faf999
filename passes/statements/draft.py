"""A program on its way through the passes: the graph, and what the plan has said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps

from meshwright.compiler.capture.capture import Captured
from meshwright.compiler.graph.ir import Graph, Node
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.emit import Movement
from meshwright.compiler.stages import Stage
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Statement


@dataclass(frozen=True, slots=True)
class Pin:
    """A layout that statements of the plan wrote, each some of its dims."""

    layout: Layout
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Modules between whose split linears activations are split along the sequence."""

    modules: frozenset[str]
    axes: tuple[str, ...]
    statement: Statement
    keep_gathered: bool = False
    """Whether what is gathered is saved for the backward, not gathered again."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What every pass takes and returns; none of them edits one in place."""

    plan: Plan
    mesh: Mesh
    captured: Captured
    graph: Graph
    modules: Mapping[str, str] = field(default_factory=dict)
    """Every module of the model but the root: qualified name to class name."""
    inputs: Mapping[str, Pin] = field(default_factory=dict)
    """Layouts in which operators use parameters, buffers and arguments, by `input_key`. One dim may
    be longer than the tensor's until `pad` has padded it."""
    stored: Mapping[str, Pin] = field(default_factory=dict)
    """Layouts in which ranks store parameters and buffers, by name, where operators use them in
    others. One dim may be longer than the tensor's: what is added are zeros that nothing sees."""
    values: Mapping[Node, Pin] = field(default_factory=dict)
    """Layouts of activations, by the node that computes them."""
    entering: Mapping[Node, tuple[tuple[Node, Pin], ...]] = field(default_factory=dict)
    """By the first node inside a module: layouts of the values that enter there."""
    regions: tuple[Region, ...] = ()
    movements: tuple[Movement, ...] = ()
    """Every change of layout that was inserted, in the forward and in the backward."""
    variant_of: tuple[str, ...] | None = None
    """Of a compiled program for another mode or other inputs: the inputs that the first one has.
    What statements say of inputs and modules that are not used here has no effect."""
    evaluation: Callable[[], Graph | None] = lambda: None
    """Captures the model's eval mode, for modules that only run there; nothing if it cannot be."""
    stages: tuple[Stage, ...] = ()
    """The graphs that run, once forward and backward are apart; `graph` is what they were."""

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The graphs as they are after the last pass: one until forward and backward are apart."""
        parts = tuple(graph for stage in self.stages for graph in stage.graphs.values())
        return parts or (self.graph,)


def on_graph(function: Callable[[Graph], Graph]) -> Callable[[Draft], Draft]:
    """A pass over drafts that rewrites their graph by one that reads no plan."""

    @wraps(function)
    def run(draft: Draft) -> Draft:
        return replace(draft, graph=function(draft.graph))

    return run


def pinned_inputs(draft: Draft, graph: Graph) -> frozenset[Node]:
    """The inputs of `graph` that the plan laid out, and what stands for them where they are stored
    in another layout."""
    found: set[Node] = set()
    for node in graph.nodes:
        source = input_behind(node)
        pin = draft.inputs.get(input_key(source)) if source else None
        if pin and node.placed == pin.layout.canonical(draft.mesh):
            found.add(node)
    return frozenset(found)


def input_key(node: Node) -> str:
    """An input's canonical name; an argument may be called as a parameter is, and is not it."""
    kind, name = node.args[:2]
    return str(name) if node.of_model else f"{kind} {name}"
