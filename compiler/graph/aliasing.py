"""Which values share memory, and how many bytes are behind each."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from meshwright.compiler.graph.ir import GETITEM, Graph, MeshOp, Node, Op
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.layout.mesh import Mesh

aten = torch.ops.aten

IDENTITIES: frozenset[Op] = frozenset(
    {
        aten.detach.default,
        aten.alias.default,
        *(MeshOp(kind.name) for kind in COLLECTIVES.values() if kind.is_identity),
    }
)
"""Operators that do nothing when a graph runs: no autograd is there to see them."""


@lru_cache(maxsize=4096)
def is_view(op: Op) -> bool:
    """Whether the result aliases an operand without writing to it, by the operator's schema."""
    if isinstance(op, MeshOp):
        kind = COLLECTIVES.get(op.name)
        return op.name == "bucket_item" if kind is None else kind.is_view
    returns = op._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )


def has_no_memory(op: Op) -> bool:
    """Whether the result has no memory of its own, but that of the first operand or a part of it:
    a view, or what does nothing."""
    return op in IDENTITIES or is_view(op)


def is_part(node: Node) -> bool:
    """Whether a value has no memory of its own: of multiple results, one of an operator whose
    results have none."""
    return has_no_memory(node.args[0].op if node.op == GETITEM else node.op)


def memory_of(node: Node) -> Node:
    """The node whose memory a value is in: of multiple results that have memory, each has its
    own, where `storage` has one for all of them."""
    while is_part(node):
        node = node.operands()[0]
    return node


def node_bytes(node: Node, graph: Graph) -> int:
    """The bytes that one rank holds of all results of a node."""
    return local_bytes(node, graph.mesh)


def local_bytes(node: Node, mesh: Mesh) -> int:
    """The bytes that one rank of `mesh` holds of all results of a node."""
    return sum(
        math.prod(layout.local_shape(mesh)) * type.dtype.itemsize
        for type, layout in node.results
        if type is not None and layout is not None
    )


ALLOCATED_BYTES = 1 << 20
"""The bytes of a bucket from which on it has memory only while it is in use: below, new memory for
each step would cost more time than it saves space."""


def is_allocated(bucket: Node, mesh: Mesh) -> bool:
    """Whether a bucket gets memory where it is first written in a step: also one whose gradients
    leave the device."""
    if bucket.kwargs.get("leaves"):
        return True
    (size,) = bucket.placed.local_shape(mesh)
    return size * bucket.tensor.dtype.itemsize >= ALLOCATED_BYTES


def storage(node: Node) -> Node:
    """The node whose memory a view shares; itself for any other. All results of an operator are in
    that of the operator."""
    while node.op == GETITEM or has_no_memory(node.op):
        node = node.operands()[0]
    return node
