"""The graph: nodes over torch operators and mesh operators, with global types and layouts.

A node's `type` is always the *global* one; what a rank holds follows from its `layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import Any, Final, TypeAlias

import torch

from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.dsl.errors import plural


@dataclass(frozen=True, slots=True)
class TensorType:
    """A global shape and an element type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorType:
        """The type of a tensor."""
        return TensorType(tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def differentiable(self) -> bool:
        """Whether a value of this type can carry a gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(frozen=True, slots=True)
class MeshOp:
    """An operator of Meshwright's own: a composite, a collective or part of the graph's frame."""

    name: str

    def __str__(self) -> str:
        return f"mesh::{self.name}"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from: module path and class, source line, plan line, forward node."""

    module: str = ""
    module_type: str = ""
    source: str = ""
    plan_line: str = ""
    """`gpt.plan:6`: the statement behind an input's layout or a collective."""
    axis_lines: tuple[tuple[str, str], ...] = ()
    """Of a change of layout: the statement behind it, by axis."""
    instead: str = ""
    """Of a change of layout: what the next best choice would cost, for what takes its result."""
    forward: str = ""
    modules: tuple[tuple[str, str], ...] = ()
    """The stack of (path, class) from the root to the innermost module."""
    calls: tuple[int, ...] = ()
    """For each of these, which of the module's calls it is, from 0."""
    exact: bool = False
    """Whether the model itself says in which type to compute: by casts of the operands, or where it
    turns autocast off."""
    stage: int = 0
    """The stage of a pipeline that computes it; of a parameter, the one that owns it."""
    region: str = ""
    """Of what the backward computes again: the region of a `checkpoint` statement."""
    replaced: Op | None = None
    """The operator of the model that a statement has put others in the place of."""


Op: TypeAlias = "torch._ops.OpOverload | MeshOp"
Arg: TypeAlias = Any  # Node | number | str | bool | dtype | device | None | tuple or list of those
NodeType: TypeAlias = "TensorType | tuple[TensorType | None, ...] | None"
NodeLayout: TypeAlias = "Layout | tuple[Layout | None, ...] | None"


class Phase(Enum):
    """When a node runs. A schedule moves all nodes of one phase of a stage together.

    Where the mesh has sequential axes, `BEFORE`, `SUM`, `AFTER` and `RESULTS` run once and the
    others for each of their coordinates.
    """

    COUNT = "count"
    """It sums up over all inputs what the loop needs, such as the number of labels."""
    BEFORE = "before"
    """It computes what does not depend on a sequential axis."""
    FORWARD = "forward"
    BACKWARD = "backward"
    """It computes cotangents of activations, for which the stages before it wait."""
    WEIGHT = "weight"
    """It computes gradients of parameters, for which only the optimizer waits."""
    SUM = "sum"
    """It sums up or joins what one copy of a stage has computed in the loop, for the other copy."""
    AFTER = "after"
    """It uses what was summed up or joined over the loop."""
    RESULTS = "results"
    """It takes what a step returns from the stages that compute it."""

    @property
    def once(self) -> bool:
        """Whether it runs once, and not for each coordinate of the sequential axes."""
        return self in (Phase.BEFORE, Phase.SUM, Phase.AFTER, Phase.RESULTS)

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward half of a step: it computes gradients, or joins and
        uses what the loop has left."""
        return self in (Phase.BACKWARD, Phase.WEIGHT, Phase.SUM, Phase.AFTER)


class InputKind(StrEnum):
    """What an input of a graph is; the last two come from another stage."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    """A tensor that the model holds without a name."""
    ARGUMENT = "argument"
    RECEIVED = "received"
    """A value that another stage has sent, by the name under which it did."""
    COTANGENT = "cotangent"
    """The cotangent of an output, by the output's name."""


class OutputKind(StrEnum):
    """What an output of a graph is."""

    LOSS = "loss"
    OUTPUT = "output"
    """A part of the model's output; its name is the path."""
    METRIC = "metric"
    """A number or numbers that a part of the model reports beside its output."""
    BUFFER = "buffer"
    """A buffer's new value."""
    GRADIENT = "gradient"
    """A parameter's gradient."""
    SENT = "sent"
    """A value for another stage; its name is the program's, one for each stage that takes it."""
    COTANGENT = "cotangent"
    """The cotangent of an input that is not a parameter, by the input's name."""
    SAVED = "saved"
    """A value for a later graph of the stage, which takes it by its number."""


RETURNED = (OutputKind.LOSS, OutputKind.OUTPUT, OutputKind.METRIC)
"""What a step gives its caller: every rank has it."""

_PASSED = (InputKind.RECEIVED, InputKind.COTANGENT)

INPUT = MeshOp("input")
"""What a graph is given; `args` is an `InputKind` and a name."""
SAVED = MeshOp("saved")
"""A value that an earlier graph of the stage has saved; `args` is its number."""
GETITEM = MeshOp("getitem")
"""One of the results of a node: `args` is `(node, index)`."""
TO_HOST = MeshOp("to_host")
"""Begins to bring a value to host memory; a `WAIT` ends it, and lets go of it on the device."""
TO_DISK = MeshOp("to_disk")
"""The same to a file in the folder `path`."""
TO_DEVICE = MeshOp("to_device")
"""Begins to bring a value back to the device; a `WAIT` ends it."""
MOVES = (TO_HOST, TO_DISK, TO_DEVICE)
"""What moves values of a rank, which no other takes part in."""
WAIT = MeshOp("wait")
"""A value that one of `MOVES` has brought to where it goes."""
TRANSFER = MeshOp("transfer")
"""A value of another stage, sent to the node's own; until stages have graphs of their own."""


@dataclass(eq=False, slots=True)
class Node:
    """One operation of a graph, with global shapes.

    `name` is unique in its graph, `op` is an operator of torch or of Meshwright (a collective, for
    one), `args` and `kwargs` what it is called with, `type` its shape and dtype (a tuple for
    multiple results), `layout` where the result lies on the mesh, `origin` the module, source line
    and plan line that it comes from, and `phase` when it runs. Nodes are compared by identity; a
    pass never edits one in place, it emits another.
    """

    name: Final[str]
    op: Final[Op]
    args: Final[tuple[Arg, ...]]
    kwargs: Final[Mapping[str, Arg]]
    type: Final[NodeType]
    layout: Final[NodeLayout] = None
    origin: Final[Origin] = field(default_factory=Origin)
    requires_grad: Final[bool] = False
    """Whether a parameter that wants a gradient feeds it through differentiable operators."""
    phase: Final[Phase] = Phase.FORWARD
    _operands: tuple[Node, ...] | None = field(default=None, init=False, repr=False)

    @property
    def stage(self) -> int:
        """The stage that computes it; `TRANSFER` alone takes values of other stages."""
        return self.origin.stage

    @property
    def held(self) -> bool:
        """Whether it is an input that ranks hold throughout a step: not one from another stage."""
        return self.op == INPUT and self.args[0] not in _PASSED

    @property
    def of_model(self) -> bool:
        """Whether it is an input that the model holds: a parameter, buffer or constant."""
        return self.held and self.args[0] != InputKind.ARGUMENT

    @property
    def tensor(self) -> TensorType:
        """The type of a node that is one tensor."""
        assert isinstance(self.type, TensorType), self.name
        return self.type

    @property
    def placed(self) -> Layout:
        """The layout of a node that is one tensor."""
        assert self.layout is not None and not isinstance(self.layout, tuple), self.name
        return self.layout

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts of the results, without those that are not tensors."""
        layouts = self.layout if isinstance(self.layout, tuple) else (self.layout,)
        return tuple(layout for layout in layouts if layout is not None)

    @property
    def results(self) -> Iterator[tuple[TensorType | None, Layout | None]]:
        """The type and the layout of each result; None for what is not a tensor, or not placed."""
        types = self.type if isinstance(self.type, tuple) else (self.type,)
        layouts = self.layout if isinstance(self.layout, tuple) else (self.layout,)
        return zip(types, layouts, strict=True)

    def operands(self) -> tuple[Node, ...]:
        """Every node among the arguments, in order, repeats included."""
        if self._operands is None:  # passes ask dozens of times
            self._operands = tuple(nodes_in((*self.args, *self.kwargs.values())))
        return self._operands

    def __repr__(self) -> str:
        return f"%{self.name}"


def nodes_in(arg: Arg) -> Iterator[Node]:
    """Every node inside a nested argument."""
    if isinstance(arg, Node):
        yield arg
    elif isinstance(arg, (tuple, list)):
        for item in arg:
            # Most are nodes or plain: a generator for each of them would cost more than all else.
            if isinstance(item, Node):
                yield item
            elif isinstance(item, (tuple, list)):
                yield from nodes_in(item)


def map_nodes(arg: Arg, function: Callable[[Node], Arg]) -> Arg:
    """The same nested argument with each node replaced by `function(node)`."""
    if isinstance(arg, Node):
        return function(arg)
    if isinstance(arg, tuple):
        return tuple(map_nodes(item, function) for item in arg)
    if isinstance(arg, list):
        return [map_nodes(item, function) for item in arg]
    return arg


@dataclass(frozen=True, slots=True)
class Output:
    """A value that a graph returns: what it is, what it is called, and what computes it."""

    kind: OutputKind
    name: str
    node: Node

    @property
    def label(self) -> str:
        """The output as texts call it: `loss`, `output:logits`, `gradient:blocks.0.up.weight`."""
        return f"{self.kind}:{self.name}" if self.name else str(self.kind)

    def of(self, node: Node) -> Output:
        """This output, computed by another node."""
        return replace(self, node=node)


@dataclass(frozen=True, slots=True)
class Graph:
    """The nodes of a forward or a backward, in an order in which they can run.

    `name` is `stage0.forward` or `stage0.backward`, `mesh` the axes, `nodes` every `Node`, and
    `outputs` what is returned, in order: see `OutputKind`.
    """

    name: str
    mesh: Mesh
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes that stand for parameters, buffers, constants and arguments."""
        return tuple(node for node in self.nodes if node.op == INPUT)

    @property
    def returned(self) -> frozenset[Node]:
        """The nodes that outputs are computed by."""
        return frozenset(output.node for output in self.outputs)

    @property
    def results(self) -> tuple[Output, ...]:
        """The outputs that running the graph returns: what is saved is handed over, and gradients
        are left in their buckets."""
        apart = (OutputKind.SAVED, OutputKind.GRADIENT)
        return tuple(output for output in self.outputs if output.kind not in apart)

    def outputs_of(self, *kinds: OutputKind) -> tuple[Output, ...]:
        """The outputs that are one of `kinds`, in order."""
        return tuple(output for output in self.outputs if output.kind in kinds)

    def __repr__(self) -> str:
        return (
            f"<Graph {self.name}: {plural(len(self.nodes), 'node')}, "
            f"{plural(len(self.inputs), 'input')}, {plural(len(self.outputs), 'output')}, "
            f"mesh {self.mesh}>"
        )

    def users(self) -> dict[Node, list[Node]]:
        """Each node's users, in order, each once."""
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for operand in dict.fromkeys(node.operands()):
                users[operand].append(node)
        return users


class Builder:
    """Collects the nodes of a new graph and keeps their names unique."""

    def __init__(self, name: str, mesh: Mesh) -> None:
        self.name, self.mesh = name, mesh
        self.nodes: list[Node] = []
        self.phase = Phase.FORWARD
        """The phase of what is emitted; a copy keeps its own."""
        self._taken: dict[str, int] = {}

    def unique(self, stem: str) -> str:
        """`stem`, or `stem_1`, `stem_2`, ... if it is taken."""
        count = self._taken.get(stem)
        if count is None:
            self._taken[stem] = 0
            return stem
        while True:
            count += 1
            name = f"{stem}_{count}"
            if name not in self._taken:
                self._taken[stem] = count
                self._taken[name] = 0
                return name

    def emit(
        self,
        op: Op,
        args: tuple[Arg, ...],
        kwargs: Mapping[str, Arg] | None = None,
        *,
        type: NodeType,
        layout: NodeLayout = None,
        origin: Origin | None = None,
        requires_grad: bool = False,
        name: str = "",
        phase: Phase | None = None,
    ) -> Node:
        """Append a node; its name is made unique from `name` or the operator's."""
        node = Node(
            self.unique(name or op_stem(op)),
            op,
            args,
            dict(kwargs or {}),
            type,
            layout,
            origin or Origin(),
            requires_grad,
            phase or self.phase,
        )
        self.nodes.append(node)
        return node

    def adopt(self, node: Node) -> None:
        """Append a node as it is, its operands being in this builder already."""
        name = self.unique(node.name)
        assert name == node.name, name
        self.nodes.append(node)

    def copy(
        self,
        node: Node,
        mapping: Mapping[Node, Node] | Callable[[Node], Arg],
        *,
        args: tuple[Arg, ...] | None = None,
        kwargs: Mapping[str, Arg] | None = None,
        type: NodeType = None,
        layout: NodeLayout = None,
        origin: Origin | None = None,
        name: str = "",
        phase: Phase | None = None,
    ) -> Node:
        """Append `node` with its operands replaced by `mapping`, which must hold each of them.

        What else is given stands in place of the node's own, with operands of the new graph.
        """
        operand = mapping if callable(mapping) else mapping.__getitem__
        if args is None:
            args = map_nodes(node.args, operand)
        if kwargs is None:
            kwargs = {key: map_nodes(value, operand) for key, value in node.kwargs.items()}
        return self.emit(
            node.op,
            args,
            kwargs,
            type=type or node.type,
            layout=layout or node.layout,
            origin=origin or node.origin,
            requires_grad=node.requires_grad,
            name=name or node.name,
            phase=phase or node.phase,
        )

    def graph(self, outputs: Iterable[Output]) -> Graph:
        """The finished graph, without nodes that no output needs (inputs stay)."""
        outputs = tuple(outputs)
        needed: set[Node] = {output.node for output in outputs}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if node in needed or node.op == INPUT:
                kept.append(node)
                needed.update(node.operands())
        return Graph(self.name, self.mesh, tuple(reversed(kept)), outputs)


def rewrite(
    graph: Graph,
    function: Callable[[Builder, Node, dict[Node, Node]], Node | None],
    *,
    builder: Builder | None = None,
    output: Callable[[Output, Node], Node] = lambda output, node: node,
) -> Graph:
    """The graph with each node replaced by what `function(builder, node, mapping)` returns for it.

    `mapping` gives what stands for each node before it; a node for which the function returns
    nothing is copied. `output` is given each output and the node that stands for it, and returns
    the one to take instead; what no output needs is left out. Pass `builder` where something else
    emits through it too.
    """
    builder = builder or Builder(graph.name, graph.mesh)
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        mapping[node] = function(builder, node, mapping) or builder.copy(node, mapping)
    return builder.graph([each.of(output(each, mapping[each.node])) for each in graph.outputs])


def op_stem(op: Op) -> str:
    """A short name for nodes of this operator: `linear` for `aten.linear.default`."""
    if isinstance(op, MeshOp):
        return op.name
    return op._schema.name.split("::")[-1].strip("_")
