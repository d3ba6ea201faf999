"""Where activations are split along the sequence: the values that enter a region, and what a
pending sum inside or beside it is best reduced to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import INPUT, Graph, Node, TensorType
from meshwright.compiler.layout.layout import Dim, Layout, cut, dim_axes
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.regroup import reshape
from meshwright.compiler.layout.reshard import Collective
from meshwright.passes.statements.draft import Region


class Sequences:
    """The regions of a graph: `entries` maps a region's first node to the values that enter."""

    def __init__(self, graph: Graph, regions: tuple[Region, ...], mesh: Mesh) -> None:
        self.mesh = mesh
        self.entries: dict[Node, tuple[Node, ...]] = {}
        self._axes: dict[tuple[int, int], tuple[str, ...]] = {}
        """The splitting axes of activations, by their batch and sequence lengths."""
        if regions:
            self._scan(graph, regions)

    def _scan(self, graph: Graph, regions: tuple[Region, ...]) -> None:
        for region in regions:
            for node, value in entered_activations(graph, region.modules).values():
                batch, length = value.tensor.shape[:2]
                self._axes[batch, length] = region.axes
                self.entries[node] = (*self.entries.get(node, ()), value)

    def split(self, value: Node) -> Layout | None:
        """The layout of `value` with its sequence split, or nothing where it has none to split."""
        shape, layout = value.tensor.shape, value.placed
        for (batch, length), axes in self._axes.items():
            if len(shape) > 1 and shape[:2] == (batch, length):
                return self._cut(layout, axes)
            if shape and shape[0] == batch * length:
                apart = (batch, length, *shape[1:])
                try:
                    found = self._cut(reshape(layout, apart, self.mesh), axes)
                    return found and reshape(found, shape, self.mesh).canonical(self.mesh)
                except LayoutError:
                    return None
        return None

    def moves(self, value: Node, move: Collective) -> bool:
        """Whether a change of layout splits or gathers the sequence of an activation."""
        shape = value.tensor.shape
        dims = {each.split_dim(a) for each in (move.source, move.target) for a in move.axes}
        for (batch, length), axes in self._axes.items():
            apart = _sequence_dims(shape, length) if shape[:1] == (batch,) else set()
            if not set(move.axes) <= set(axes):
                continue
            split = move.source if set(move.axes) <= set(move.source.split_axes) else move.target
            moved = (split.dims[i] for i in dims if i is not None)
            if dims & apart or any(self._is_flat(dim, batch, length, axes) for dim in moved):
                return True
        return False

    def _is_flat(self, dim: Dim, batch: int, length: int, axes: tuple[str, ...]) -> bool:
        """Whether a dim is batch and sequence in one, the sequence split over `axes`; each token
        may be there several times, for its experts."""
        layout, tokens = Layout((dim,)), batch * length
        (size,) = layout.shape
        if not tokens or size % tokens:
            return False
        count = size // tokens
        for place, shape in ((1, (batch, length, count)), (2, (count, batch, length))):
            try:
                found = reshape(layout, shape, self.mesh)
            except LayoutError:
                continue
            if any(axis in dim_axes(found.dims[place]) for axis in axes):
                return True
        return False

    def _cut(self, layout: Layout, axes: tuple[str, ...]) -> Layout | None:
        layout = layout.drop_partial(axes).drop_varying(axes).drop_split(axes, self.mesh)
        if dim_axes(layout.dims[1]):
            return None
        dims = (layout.dims[0], cut(layout.shape[1], *axes), *layout.dims[2:])
        return layout.with_dims(dims).canonical(self.mesh)

    def proposals(self, operands: Iterable[Node]) -> Mapping[Node, Layout]:
        """For operands with a sum pending over a region's axes: their layout once split instead."""
        found: dict[Node, Layout] = {}
        if not self._axes:
            return found
        for value in operands:
            if isinstance(value.type, TensorType) and value.placed.partial:
                layout = self.split(value)
                if layout is not None and set(layout.split_axes) & set(value.placed.partial_axes):
                    found[value] = layout
        return found


def _sequence_dims(shape: tuple[int, ...], length: int) -> set[int]:
    """The dims that may be a sequence of `length`, or the rows and columns that it was.

    Heads or channels may stand before them.
    """
    found: set[int] = set()
    for first, last in itertools.combinations(range(1, len(shape) + 1), 2):
        if math.prod(shape[first:last]) == length:
            found.update(i for i in range(first, last) if last - first == 1 or shape[i] > 1)
    return found


def entered_activations(graph: Graph, modules: frozenset[str]) -> dict[str, tuple[Node, Node]]:
    """By module: the first node inside that takes an activation from outside, and that value."""
    found: dict[str, tuple[Node, Node]] = {}
    for node in graph.nodes:
        for module, _ in node.origin.modules:
            if module in modules and module not in found:
                value = _activation(node, module)
                if value is not None:
                    found[module] = (node, value)
    return found


def _activation(node: Node, module: str) -> Node | None:
    """The first operand from outside `module` that looks like `[batch, sequence, ...]`."""
    for operand in node.operands():
        type = operand.type
        outside = all(path != module for path, _ in operand.origin.modules)
        weight = operand.op == INPUT and operand.args[0] != "argument"
        floating = isinstance(type, TensorType) and type.dtype.is_floating_point
        if outside and not weight and floating and len(operand.tensor.shape) > 2:
            return operand
    return None
