"""Random graphs of real operators, with random pins, as the chooser of placements takes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Builder,
    Graph,
    InputKind,
    MeshOp,
    Node,
    Origin,
    Output,
    OutputKind,
    TensorType,
    nodes_in,
)
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import Collective
from meshwright.compiler.placing.candidates import Candidates
from meshwright.compiler.placing.result_types import result_type
from meshwright.compiler.placing.rules.notation import Placement
from tests.compiler.layouts import split

aten: Any = torch.ops.aten

MESHES = (Mesh((("a", 2),)), Mesh((("a", 2), ("b", 2))), Mesh((("a", 4), ("b", 2))))
SHAPES = ((8, 8), (16, 8), (4, 8, 8))
MOVED = MeshOp("moved")


@dataclass
class Problem:
    """A graph and its pins: layouts of inputs, of values that the plan wants moved, values of which
    no use may undo a split, the layouts in which some values are wanted at the end, and calls
    before which no gather is asked for."""

    graph: Graph
    fixed: dict[Node, Layout]
    moved: dict[Node, Callable[[Layout], Layout]]
    kept: frozenset[Node]
    ends: dict[Node, list[Layout]]
    unasked: frozenset[Node]

    def is_unasked(
        self, user: Node, place: int, placement: Placement, collective: Collective
    ) -> bool:
        """Whether the plan should ask for a change of an operand's layout, and does not."""
        return user in self.unasked and (place + len(collective.axes)) % 2 == 1

    def candidates(self) -> Candidates:
        """The placements of each call."""
        return Candidates(self.graph, self.graph.mesh, self.fixed, self.moved, self.kept)


def drawn(seed: int, most: int) -> Problem:
    """A random graph of up to `most` operators; equal seeds give equal ones."""
    rng = random.Random(seed)
    drawer = Drawer(rng, rng.choice(MESHES))
    drawer.argument(rng.choice(SHAPES))
    if rng.random() < 0.4:
        drawer.argument(drawer.values[0].tensor.shape)
    for _ in range(rng.randint(2, most)):
        drawer.step()
    return drawer.problem()


@dataclass
class Drawer:
    """Draws one operator after the other, on values that are there or on new weights."""

    rng: random.Random
    mesh: Mesh
    stage: int = 0
    fixed: dict[Node, Layout] = field(default_factory=dict)
    moved: dict[Node, Callable[[Layout], Layout]] = field(default_factory=dict)
    values: list[Node] = field(default_factory=list)
    weights: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.builder = Builder("drawn", self.mesh)

    def problem(self) -> Problem:
        """What has been drawn, with the last value and some others wanted whole or as drawn."""
        ends = {self.values[-1]: [replicated(self.values[-1].tensor.shape)]}
        for value in self.values:
            if self.rng.random() < 0.1:
                ends.setdefault(value, []).append(self.layout(value.tensor.shape))
        kept = frozenset(w for w in self.weights if self.rng.random() < 0.6)
        graph = self.builder.graph(
            Output(OutputKind.OUTPUT, each.name, each) for each in self.values
        )
        unasked = frozenset(node for node in graph.nodes if self.rng.random() < 0.3)
        return Problem(graph, self.fixed, self.moved, kept, ends, unasked)

    def step(self) -> None:
        """Draw one operator."""
        self.stage += self.rng.random() < 0.15
        value = self.rng.choice(self.values[-4:])
        while not self.rng.choice(OPERATORS)(self, value):
            value = self.rng.choice(self.values[-4:])

    def argument(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Node:
        """A new input of the model's caller, sometimes a pending sum, or varying."""
        layout = self.layout(shape)
        free = set(self.mesh.names) - set(layout.axes_used)
        if free and dtype.is_floating_point and self.rng.random() < 0.3:
            state = self.rng.choice((layout.add_partial, layout.add_varying))
            layout = state([min(free)])
        node = self._input(InputKind.ARGUMENT, shape, dtype, layout)
        if dtype.is_floating_point:
            self.values.append(node)
        return node

    def weight(self, *shape: int) -> Node:
        """A parameter of this shape: one that there is, or a new one."""
        same = [each for each in self.weights if each.tensor.shape == shape]
        if same and self.rng.random() < 0.3:
            return self.rng.choice(same)
        layout = self.layout(shape) if self.rng.random() < 0.8 else replicated(shape)
        node = self._input(InputKind.PARAMETER, shape, torch.float32, layout)
        self.weights.append(node)
        return node

    def _input(
        self, kind: InputKind, shape: Sequence[int], dtype: torch.dtype, layout: Layout
    ) -> Node:
        node = self.builder.emit(
            INPUT,
            (kind, f"input{len(self.fixed)}"),
            type=TensorType(tuple(shape), dtype),
            requires_grad=kind == InputKind.PARAMETER,
        )
        self.fixed[node] = layout
        return node

    def layout(self, shape: Sequence[int]) -> Layout:
        """A random layout, neither partial nor varying."""
        axes: dict[int, tuple[str, ...]] = {}
        for axis in self.mesh.names:
            fits = [
                dim
                for dim, size in enumerate(shape)
                if size % (self.mesh.size(axes.get(dim, ())) * self.mesh.size(axis)) == 0
            ]
            if fits and self.rng.random() < 0.8:
                dim = self.rng.choice(fits)
                axes[dim] = (*axes.get(dim, ()), axis)
        return split(shape, dict(axes))

    def call(self, op: Any, *args: Any) -> bool:
        """Emit a call, and of multiple results each that can be used."""
        type = result_type(op, args, {})
        differentiated = any(n.requires_grad for n in nodes_in(args))
        node = self._emit(op, args, type, differentiated)
        for i, each in enumerate(type if isinstance(type, tuple) else ()):
            if each is not None and each.dtype.is_floating_point:
                self.values.append(self._emit(GETITEM, (node, i), each, differentiated))
        if isinstance(type, TensorType):
            self.values.append(node)
        return True

    def mark(self, value: Node) -> bool:
        """Want a value in a random layout from here on."""
        node = self._emit(MOVED, (value,), value.type, value.requires_grad)
        layout = self.layout(value.tensor.shape)
        self.moved[node] = lambda _: layout
        self.values.append(node)
        return True

    def _emit(self, op: Any, args: Sequence[Any], type: Any, differentiated: bool) -> Node:
        return self.builder.emit(
            op,
            tuple(args),
            type=type,
            requires_grad=differentiated,
            origin=Origin(stage=self.stage),
        )


def _linear(draw: Drawer, x: Node) -> bool:
    width = x.tensor.shape[-1]
    return draw.call(aten.linear.default, x, draw.weight(draw.rng.choice((8, 16)), width))


def _linear_with_bias(draw: Drawer, x: Node) -> bool:
    width, out = x.tensor.shape[-1], draw.rng.choice((8, 16))
    return draw.call(aten.linear.default, x, draw.weight(out, width), draw.weight(out))


def _product(draw: Drawer, x: Node) -> bool:
    fits = [y for y in draw.values if _are_matrices(x, y)]
    return bool(fits) and draw.call(aten.mm.default, x, draw.rng.choice(fits))


def _are_matrices(x: Node, y: Node) -> bool:
    left, right = x.tensor.shape, y.tensor.shape
    return len(left) == len(right) == 2 and left[1] == right[0]


def _pair(draw: Drawer, x: Node) -> bool:
    op = draw.rng.choice((aten.add.Tensor, aten.mul.Tensor))
    same = [y for y in draw.values if y.tensor.shape == x.tensor.shape]
    return draw.call(op, x, draw.rng.choice(same))


def _broadcast(draw: Drawer, x: Node) -> bool:
    op = draw.rng.choice((aten.add.Tensor, aten.mul.Tensor))
    return draw.call(op, x, draw.weight(x.tensor.shape[-1]))


def _filled(draw: Drawer, x: Node) -> bool:
    draw.call(aten.full.default, list(x.tensor.shape), draw.rng.choice((0.0, 1.0)))
    return draw.call(aten.add.Tensor, x, draw.values[-1])


def _elementwise(draw: Drawer, x: Node) -> bool:
    return draw.call(draw.rng.choice((aten.relu.default, aten.gelu.default)), x)


def _view(draw: Drawer, x: Node) -> bool:
    shape = x.tensor.shape
    if len(shape) > 2:
        return draw.call(aten.view.default, x, [shape[0] * shape[1], *shape[2:]])
    return shape[0] % 2 == 0 and draw.call(aten.view.default, x, [2, shape[0] // 2, shape[1]])


def _transpose(draw: Drawer, x: Node) -> bool:
    return draw.call(aten.transpose.int, x, 0, -1)


def _reduction(draw: Drawer, x: Node) -> bool:
    op = draw.rng.choice((aten.sum.dim_IntList, aten.mean.dim))
    dim = draw.rng.randrange(len(x.tensor.shape))
    keep = len(x.tensor.shape) < 3 or draw.rng.random() < 0.5
    return draw.call(op, x, [dim], keep)


def _softmax(draw: Drawer, x: Node) -> bool:
    return draw.call(aten._softmax.default, x, draw.rng.choice((0, -1)), False)


def _norm(draw: Drawer, x: Node) -> bool:
    width = x.tensor.shape[-1]
    return draw.call(
        aten.native_layer_norm.default, x, [width], draw.weight(width), draw.weight(width), 1e-5
    )


def _embedding(draw: Drawer, x: Node) -> bool:
    ids = draw.argument(x.tensor.shape[:-1], torch.int64)
    return draw.call(aten.embedding.default, draw.weight(8, x.tensor.shape[-1]), ids)


def _cat(draw: Drawer, x: Node) -> bool:
    same = [y for y in draw.values if y.tensor.shape == x.tensor.shape]
    dim = draw.rng.randrange(len(x.tensor.shape))
    return x.tensor.shape[dim] < 16 and draw.call(aten.cat.default, [x, draw.rng.choice(same)], dim)


def _slice(draw: Drawer, x: Node) -> bool:
    dim = draw.rng.randrange(len(x.tensor.shape))
    size = x.tensor.shape[dim]
    return size > 4 and draw.call(aten.slice.Tensor, x, dim, 0, size // 2)


def _split(draw: Drawer, x: Node) -> bool:
    dim = draw.rng.randrange(len(x.tensor.shape))
    size = x.tensor.shape[dim]
    return size > 4 and draw.call(aten.split.Tensor, x, size // 2, dim)


OPERATORS: tuple[Callable[[Drawer, Node], bool], ...] = (
    *(
        _linear,
        _linear,
        _linear_with_bias,
        _product,
        _pair,
        _pair,
        _broadcast,
        _filled,
        _elementwise,
    ),
    *(_view, _transpose, _reduction, _softmax, _norm, _embedding, _cat, _slice, _split),
    Drawer.mark,
)
"""Each draws one operator on a value, and returns whether it could."""
