"""Types and layouts of the operators that hold a graph together: inputs, results, saved values and
flat buffers. A rule allows a call multiple layouts; each of these has exactly one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    MOVES,
    SAVED,
    TRANSFER,
    WAIT,
    Graph,
    MeshOp,
    Node,
    NodeLayout,
    NodeType,
    Op,
    OutputKind,
    TensorType,
)
from meshwright.compiler.layout.factors import cut
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh

BUCKET, BUCKET_ITEM = MeshOp("bucket"), MeshOp("bucket_item")

Typed = tuple[NodeType, NodeLayout]
Saved = Mapping[str, Node]
"""What the graphs of a stage save, by number."""


def bucket_type(parts: Sequence[Node], dtype: torch.dtype, mesh: Mesh) -> tuple[TensorType, Layout]:
    """The type and layout of a flat buffer of what each rank holds of these gradients: split over
    every axis that splits one of them, since ranks along it hold different elements, and pending
    where they are."""
    size = sum(math.prod(part.placed.local_shape(mesh)) for part in parts)
    used = {axis for part in parts for axis in part.placed.canonical(mesh).split_axes}
    axes = tuple(axis for axis in mesh.names if axis in used)
    total = size * mesh.size(axes)
    layout = Layout((cut(total, *axes),), parts[0].placed.partial)
    return TensorType((total,), dtype), layout


def saved_by(graphs: Sequence[Graph]) -> dict[str, Node]:
    """What these graphs of one stage save, by number."""
    return {o.name: o.node for graph in graphs for o in graph.outputs_of(OutputKind.SAVED)}


def _input(node: Node, mesh: Mesh, saved: Saved) -> Typed:
    stored = node.args[0] in ("parameter", "buffer", "constant")
    return node.type, node.placed.drop_states() if stored else node.layout


def _item(node: Node, mesh: Mesh, saved: Saved) -> Typed:
    source, index = node.args
    return source.type[index], source.layout[index]


def _moved(node: Node, mesh: Mesh, saved: Saved) -> Typed:
    source: Node = node.args[0]
    return source.type, source.layout


def _saved(node: Node, mesh: Mesh, saved: Saved) -> Typed:
    value = saved.get(str(node.args[0]))
    return (None, None) if value is None else (value.type, value.layout)


def _bucket(node: Node, mesh: Mesh, saved: Saved) -> Typed:
    parts: tuple[Node, ...] = node.args
    alike = len({part.placed.partial for part in parts}) == 1
    return bucket_type(parts, node.tensor.dtype, mesh) if alike else (None, None)


def _bucket_item(node: Node, mesh: Mesh, saved: Saved) -> Typed:
    flat, index = node.args
    bucket: Node = flat
    while bucket.op != BUCKET:
        found = saved.get(str(bucket.args[0])) if bucket.op == SAVED else bucket.args[0]
        if not isinstance(found, Node):
            return None, None
        bucket = found
    part: Node = bucket.args[index]
    reduced = set(bucket.placed.partial_axes) - set(flat.placed.partial_axes)
    type = TensorType(part.tensor.shape, bucket.tensor.dtype)
    return type, replace(part.placed.drop_partial(reduced), varying=flat.placed.varying)


FRAME: dict[Op, Callable[[Node, Mesh, Saved], Typed]] = {
    INPUT: _input, GETITEM: _item, SAVED: _saved, BUCKET: _bucket, BUCKET_ITEM: _bucket_item,
    **dict.fromkeys((TRANSFER, *MOVES, WAIT), _moved),
}  # fmt: skip
"""The type and the layout that such a node must have; None where it cannot have any."""
