"""Find where activations are split along the sequence: the values that enter a region, and the
layouts that pending sums inside it or next to it are reduced to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Graph, Node, TensorType
from meshwright.compiler.layout.factors import Dim, cut, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.regroup import reshape
from meshwright.compiler.layout.reshard import Collective
from meshwright.passes.statements.draft import Attending, Region
from meshwright.passes.statements.targets import entered


@dataclass(frozen=True, eq=False)
class Flow:
    """A sequence on its way through the graph: the region that it is in, and its lengths there."""

    region: Region
    batch: int
    length: int
    outer: tuple[str, ...] = ()
    """The axes of `context` over which the sequence is split too, outside of the region's."""

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes over which the sequence is split in the region."""
        return (*self.outer, *self.region.axes)

    def leads(self, shape: tuple[int, ...]) -> bool:
        """Whether a value of this shape begins with the batch and the sequence, apart or as one."""
        return shape[:2] == (self.batch, self.length) or shape[:1] == (self.batch * self.length,)


class Sequences:
    """The regions of a graph: `entries` maps a region's first node to the values that enter.

    Which region a value belongs to follows from where its data comes from, or where it goes if it
    is made before any region. It does not follow from its size, which regions may share.
    """

    def __init__(
        self,
        graph: Graph,
        regions: tuple[Region, ...],
        attending: tuple[Attending, ...],
        mesh: Mesh,
    ) -> None:
        self.mesh, self.attending = mesh, attending
        self.entries: dict[Node, tuple[tuple[Node, Flow], ...]] = {}
        self._flows: dict[Node, tuple[Flow, ...]] = {}
        """The sequences that a node works on, that of its result first."""
        self._here: tuple[Flow, ...] = ()
        self._axes = {axis for region in regions for axis in region.axes}
        self._make, self._nested = cache(self._flow), cache(_nested)
        for region in regions:
            for node, value in entered_activations(graph, region.modules).values():
                self._enter(node, value, self._make(region, *value.tensor.shape[:2]))
        if regions:
            self._follow(graph, regions)

    def _flow(self, region: Region, batch: int, length: int) -> Flow:
        around = (each.statement.over for each in self.attending if overlap(region, each))
        return Flow(region, batch, length, next(around, ()))

    def _enter(self, node: Node, value: Node, flow: Flow) -> None:
        """Note that `value` enters a region with `node`; of multiple, the innermost counts."""
        entered = dict(self.entries.get(node, ()))
        known = entered.get(value)
        if known is None or depth(node, known.region) <= depth(node, flow.region):
            entered[value] = flow
        self.entries[node] = tuple(entered.items())

    def _follow(self, graph: Graph, regions: tuple[Region, ...]) -> None:
        current: dict[Node, Flow] = {}
        for node in graph.nodes:
            inside = max(regions, key=partial(depth, node))
            for value in node.operands() if depth(node, inside) >= 0 else ():
                flow = current.get(value)
                if flow and flow.region is not inside and self._returns(value, flow, inside):
                    self._enter(node, value, self._make(inside, flow.batch, flow.length))
            current.update(self.entries.get(node, ()))
            found = dict.fromkeys(current[n] for n in node.operands() if n in current)
            if found:
                current[node] = min(found, key=partial(_strangeness, node))
                self._flows[node] = tuple(dict.fromkeys((current[node], *found)))
        users = graph.users()
        for node in reversed(graph.nodes):
            if node not in self._flows:
                found = dict.fromkeys(flow for user in users[node] for flow in self._flows[user])
                self._flows[node] = tuple(found)

    def _returns(self, value: Node, flow: Flow, inside: Region) -> bool:
        """Whether a value comes back to the region around the one that it was in."""
        divides = flow.length % self.mesh.size(inside.axes) == 0
        leads = isinstance(value.type, TensorType) and flow.leads(value.tensor.shape)
        return leads and divides and self._nested(flow.region, inside)

    def flows(self, node: Node) -> tuple[Flow, ...]:
        """The sequences that a node works on, that of its result first."""
        return self._flows.get(node, ())

    def consider(self, node: Node) -> None:
        """Turn to `node`: what is asked next is about its operands."""
        self._here = self.flows(node)

    def split(self, layout: Layout, flow: Flow) -> Layout | None:
        """`layout`, of a value, with its sequence split; None if it has none to split."""
        shape, axes = layout.shape, flow.axes
        if shape[:2] == (flow.batch, flow.length):
            return self._cut(layout, axes)
        if not flow.leads(shape):
            return None
        try:
            apart = reshape(layout, (flow.batch, flow.length, *shape[1:]), self.mesh)
            found = self._cut(apart, axes)
            return found and reshape(found, shape, self.mesh).canonical(self.mesh)
        except LayoutError:
            return None

    def moves(self, value: Node, move: Collective) -> bool:
        """Whether a change of layout splits or gathers the sequence of an activation."""
        shape = value.tensor.shape
        dims = {each.split_dim(a) for each in (move.source, move.target) for a in move.axes}
        split = move.source if set(move.axes) <= set(move.source.split_axes) else move.target
        moved = [split.dims[i] for i in dims if i is not None]
        for flow in self._here:
            asked = flow.region.axes if move.row.moves else flow.axes
            if not set(move.axes) <= set(asked):
                continue
            apart = _sequence_dims(shape, flow.length) if shape[:1] == (flow.batch,) else set()
            if dims & apart or any(self._is_flat(dim, flow) for dim in moved):
                return True
        return False

    def _is_flat(self, dim: Dim, flow: Flow) -> bool:
        """Whether a dim holds batch and sequence, with the sequence split over the region's axes;
        each token may be repeated, for multiple experts."""
        layout, batch, length = Layout((dim,)), flow.batch, flow.length
        tokens = batch * length
        (size,) = layout.shape
        if not tokens or size % tokens:
            return False
        count = size // tokens
        for place, shape in ((1, (batch, length, count)), (2, (count, batch, length))):
            try:
                found = reshape(layout, shape, self.mesh)
            except LayoutError:
                continue
            if any(axis in dim_axes(found.dims[place]) for axis in flow.axes):
                return True
        return False

    def _cut(self, layout: Layout, axes: tuple[str, ...]) -> Layout | None:
        # A value from another region is no longer split over that region's axes.
        left = [axis for axis in dim_axes(layout.dims[1]) if axis in self._axes]
        layout = layout.drop_partial(axes).drop_varying(axes).drop_split((*axes, *left), self.mesh)
        return cut_inside(layout, 1, axes, self.mesh)

    def offered(self, layout: Layout) -> Iterator[Layout]:
        """The layouts with the sequence split, for an operand in a layout with a sum pending over
        its axes."""
        for flow in self._here if layout.partial else ():
            found = self.split(layout, flow)
            if found is not None and set(found.split_axes) & set(layout.partial_axes):
                yield found


def cut_inside(layout: Layout, dim: int, axes: tuple[str, ...], mesh: Mesh) -> Layout | None:
    """`layout` with `dim` split over `axes` too, inside of the axes that split it already; None
    where ranks hold no equal parts of consecutive entries then."""
    if len(layout.dims[dim]) > 1 or len(layout.dims[dim][0]) > 1:
        return None
    ((factor,),) = layout.dims[dim]
    if factor.size % mesh.size((*factor.axes, *axes)):
        return None
    own = cut(factor.size, *factor.axes, *axes)
    return layout.with_dims((*layout.dims[:dim], own, *layout.dims[dim + 1 :])).canonical(mesh)


def _strangeness(node: Node, flow: Flow) -> tuple[bool, bool]:
    """A sort key: the less a node's result has to do with an operand's sequence, the greater."""
    shape = node.tensor.shape if isinstance(node.type, TensorType) else ()
    return not flow.leads(shape), depth(node, flow.region) < 0


def _nested(inner: Region | Attending, outer: Region | Attending) -> bool:
    """Whether a module of one region is inside a module of another."""
    return any(
        path[:end] in outer.modules
        for path in inner.modules
        for end in (0, *(i for i, letter in enumerate(path) if letter == "."))
        if path
    )


def overlap(one: Region | Attending, other: Region | Attending) -> bool:
    """Whether a module of one is a module of the other, or inside of one."""
    return bool(one.modules & other.modules) or _nested(one, other) or _nested(other, one)


def depth(node: Node, region: Region | Attending) -> int:
    """The depth in the model of the innermost module of a region around a node; -1 if none is."""
    places = (i for i, (path, _) in enumerate(node.origin.modules) if path in region.modules)
    return max(places, default=-1)


def _sequence_dims(shape: tuple[int, ...], length: int) -> set[int]:
    """The dims that may be a sequence of `length`, or the rows and columns that it is made of.

    Heads or channels may stand before them.
    """
    found: set[int] = set()
    for first, last in itertools.combinations(range(1, len(shape) + 1), 2):
        if math.prod(shape[first:last]) == length:
            found.update(i for i in range(first, last) if last - first == 1 or shape[i] > 1)
    return found


def entered_activations(graph: Graph, modules: frozenset[str]) -> dict[str, tuple[Node, Node]]:
    """As `entered`, of the values that look like activations `[batch, sequence, ...]`."""
    return entered(
        graph, modules, lambda type: type.dtype.is_floating_point and len(type.shape) > 2
    )
