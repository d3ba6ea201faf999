"""Carry dims through the graphs of a program: from each operand to the results of its operator, by
the letters of its rule, and through views by their factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch

from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    SAVED,
    InputKind,
    Node,
    OutputKind,
    TensorType,
)
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.graph.transfers import collective_kind, is_collective
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.calls import make_call
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.placing.frame import BUCKET, BUCKET_ITEM, FRAME, saved_by
from meshwright.compiler.placing.rules.lookup import rule_for
from meshwright.compiler.placing.rules.notation import Call, Operand, Spec, dim_index
from meshwright.compiler.placing.rules.slices import slice_bounds
from meshwright.compiler.placing.rules.views import RESHAPES
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.cost.dims import (
    Dim,
    block,
    expanded,
    joined,
    new,
    size_of,
    summed,
    unify,
)
from meshwright.compiler.stages import PASSED_AS

aten = torch.ops.aten

Shape: TypeAlias = "tuple[Dim, ...]"
"""The dims of one value."""
_SPLITS = (
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
)  # fmt: skip
_LIKE = (aten.view_as.default, aten.reshape_as.default)


class Trace:
    """The dims of every value of a program, and of its parameters, buffers and inputs by name."""

    def __init__(self, program: Compiled) -> None:
        self.shapes: dict[Node, tuple[Shape | None, ...]] = {}
        """By node: the dims of each result, None for what is not a tensor."""
        self.inputs: dict[tuple[str, str], Shape] = {}
        """By kind and name: those of inputs that multiple graphs may take."""
        self._passed: list[tuple[Node, str, str]] = []
        self._outputs: dict[tuple[str, str], Node] = {}
        for stage in program.stages:
            saved = saved_by(list(stage.graphs.values()))
            for graph in stage.graphs.values():
                for node in graph.nodes:
                    self.shapes[node] = tuple(self._node(node, saved, graph.mesh))
                self._note(graph.outputs)
        for node, kind, name in self._passed:
            if source := self._outputs.get((kind, name)):
                self._same(self.of(node), self.of(source))

    def of(self, node: Node) -> Shape:
        """The dims of a node that is one tensor."""
        (shape,) = self.shapes[node]
        assert shape is not None, node.name
        return shape

    def _note(self, outputs: Sequence[object]) -> None:
        """What outputs say: a gradient is like its parameter, and stages take what others send."""
        for output in outputs:
            kind, name, node = output.kind, output.name, output.node  # type: ignore[attr-defined]
            if kind is OutputKind.GRADIENT:
                self._same(self.of(node), self._input(InputKind.PARAMETER, name, node))
            elif kind in PASSED_AS:
                self._outputs[PASSED_AS[kind], name] = node

    def _same(self, a: Shape, b: Shape) -> None:
        for x, y in zip(a, b, strict=True):
            unify(x, y)

    def _input(self, kind: str, name: str, node: Node) -> Shape:
        return self.inputs.setdefault((kind, name), _fresh(node.tensor))

    def _node(self, node: Node, saved: dict[str, Node], mesh: Mesh) -> Iterator[Shape | None]:
        """The dims of the results of a node."""
        if node.op == INPUT:
            yield self._given(node)
        elif node.op == SAVED:
            yield from self.shapes[saved[str(node.args[0])]]
        elif node.op == GETITEM:
            source, index = node.args
            yield self.shapes[source][index]
        elif node.op == BUCKET:
            yield _fresh(node.tensor)
        elif node.op == BUCKET_ITEM:
            yield self.of(_part(node, saved))
        elif is_collective(node):
            for source, (type, _) in zip(node.args, node.results, strict=False):
                yield self._moved(source, type, node) if type else None
        elif node.op in FRAME:
            yield self.of(node.args[0])
        else:
            yield from self._called(node, mesh)

    def _moved(self, source: Node, type: TensorType, node: Node) -> Shape:
        """What a collective leaves: the same dims, or those of one rank's block; of counted rows,
        as many as the plan allows."""
        kind, axes = collective_kind(node.op), node.kwargs["axes"]
        if kind is not None and kind.by_count:
            return (*_fresh(type)[:1], *self.of(source)[1:])
        dims = zip(self.of(source), source.tensor.shape, type.shape, strict=True)
        found: list[Dim] = []
        for dim, old, size in dims:
            part = block(size, dim, axes) if size < old else joined(size, dim)
            found.append(dim if old == size else part)
        return tuple(found)

    def _given(self, node: Node) -> Shape:
        kind, name = node.args[:2]
        if node.held:
            return self._input(kind, name, node)
        self._passed.append((node, kind, name))
        return _fresh(node.tensor)

    def _called(self, node: Node, mesh: Mesh) -> Iterator[Shape | None]:
        """The results of an operator, by its rule."""
        call = make_call(
            node.op, node.args, node.kwargs, node.type, mesh, lambda n: Operand(n.tensor, n.placed)
        )
        given = [self.of(each) for each in call_operands(node.args, node.kwargs)]
        if found := _special(call, given):
            yield from found
            return
        spec = rule_for(node.op)(call)
        if not isinstance(spec, Spec):
            yield from map(_kept, given, call.results)
            return
        letters = _bound(spec, call, given)
        for names, (type, layout) in zip(spec.results, node.results, strict=True):
            if names is None or type is None:
                yield None
                continue
            shape: list[Dim] = []
            for i, (letter, size) in enumerate(zip(names, type.shape, strict=True)):
                if letter not in letters or letters[letter][0] != size:
                    letters[letter] = (size, new(size))
                    if composite_of(node.op) and layout is not None:
                        _count_ranks(letters[letter][1], dim_axes(layout.dims[i]), mesh)
                shape.append(letters[letter][1])
            yield tuple(shape)


def _fresh(type: TensorType) -> Shape:
    return tuple(map(new, type.shape))


def _kept(shape: Shape, type: TensorType | None) -> Shape:
    """The dims of an operand, if a result has the same sizes, or new ones."""
    return shape if type is None or type.shape == tuple(map(size_of, shape)) else _fresh(type)


def _part(node: Node, saved: dict[str, Node]) -> Node:
    """The gradient that an item of a bucket is."""
    bucket: Node = node.args[0]
    while bucket.op != BUCKET:
        bucket = saved[str(bucket.args[0])] if bucket.op == SAVED else bucket.args[0]
    part: Node = bucket.args[node.args[1]]
    return part


def _bound(spec: Spec, call: Call, given: Sequence[Shape]) -> dict[str, tuple[int, Dim]]:
    """What each letter stands for."""
    letters: dict[str, tuple[int, Dim]] = {}
    for names, operand, shape in zip(spec.operands, call.operands, given, strict=True):
        for letter, size, dim in zip(names, operand.type.shape, shape, strict=True):
            if not letter or size == 1:
                continue
            known = letters.setdefault(letter, (size, dim))
            if known[0] == size:
                unify(known[1], dim)
    return letters


def _count_ranks(dim: Dim, axes: tuple[str, ...], mesh: Mesh) -> None:
    """A dim that only the results of a composite have, with an entry for each rank along axes."""
    if dim and axes and dim[0].size == mesh.size(axes):
        dim[0].axes = axes


def _special(call: Call, given: Sequence[Shape]) -> list[Shape] | None:
    """The results of views, slices and joins; None for any other operator."""
    if call.op in RESHAPES or call.op in _LIKE:
        if call.op in _LIKE:
            return [given[1]]
        found = _fresh(_type(call))
        unify(_row(given[0]), _row(found))
        return [found]
    if call.op in (aten.slice.Tensor, aten.slice_copy.Tensor) and call.arg(4, 1) == 1:
        dim = dim_index(call.arg(1, 0), len(given[0]))
        size = call.operands[0].type.shape[dim]
        return [_replaced(given[0], dim, _sliced(given[0][dim], size, call))]
    if call.op is aten.cat.default:
        rank = len(_type(call).shape)
        dim = dim_index(call.arg(1, 0), rank)
        parts = [shape for shape in given if len(shape) == rank]
        for other in parts[1:]:
            for i in range(rank):
                if i != dim:
                    unify(parts[0][i], other[i])
        size = _type(call).shape[dim]
        return [_replaced(parts[0], dim, summed(size, [part[dim] for part in parts], 0))]
    if call.op in _SPLITS:
        dim = dim_index(call.arg(2, 0), len(given[0]))
        sizes = [type.shape[dim] for type in call.results if type is not None]
        return [_replaced(given[0], dim, _piece(given[0][dim], size)) for size in sizes]
    if call.op in (aten.repeat.default, aten.tile.default):
        return [_repeated(call, given[0])]
    if call.op is aten.repeat_interleave.self_int and call.arg(2) is not None:
        dim = dim_index(call.arg(2), len(given[0]))
        return [_replaced(given[0], dim, (*given[0][dim], *new(call.arg(1))))]
    if call.op is aten.constant_pad_nd.default:
        return [_padded(call, given[0])]
    return None


def _type(call: Call) -> TensorType:
    found = call.results[0]
    assert found is not None
    return found


def _row(shape: Shape) -> Dim:
    """All dims as one."""
    return tuple(atom for dim in shape for atom in expanded(dim))


def _replaced(shape: Shape, place: int, dim: Dim) -> Shape:
    return (*shape[:place], dim, *shape[place + 1 :])


def _sliced(dim: Dim, size: int, call: Call) -> Dim:
    """A part of a dim: one of equal blocks of it, or all but a fixed number of entries."""
    start, stop = slice_bounds(size, call.arg(2), call.arg(3))
    length = stop - start
    if length == size:
        return dim
    if length > 1 and size % length == 0 and start % length == 0:
        return _piece(dim, length)
    open_ended = start == 0 or stop == size
    return summed(length, [dim], length - size) if open_ended and length > 1 else new(length)


def _piece(dim: Dim, length: int) -> Dim:
    """A block of a dim that such blocks make up; else a dim of its own."""
    size = size_of(expanded(dim))
    if length == size:
        return dim
    piece = new(length)
    if piece and size % length == 0:
        unify(dim, (*new(size // length), *piece))
    return piece


def _repeated(call: Call, shape: Shape) -> Shape:
    result = _type(call).shape
    found: list[Dim] = [new(size) for size in result[: len(result) - len(shape)]]
    old = call.operands[0].type.shape
    for dim, before, after in zip(shape, old, result[len(found) :], strict=True):
        found.append((*new(after // max(before, 1)), *dim) if after else new(after))
    return tuple(found)


def _padded(call: Call, shape: Shape) -> Shape:
    result = _type(call).shape
    old = call.operands[0].type.shape
    return tuple(
        dim if before == after else summed(after, [dim], after - before)
        for dim, before, after in zip(shape, old, result, strict=True)
    )
