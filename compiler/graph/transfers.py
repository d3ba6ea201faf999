"""The collectives of a graph that move bytes, and those that share one transfer."""

from __future__ import annotations

from typing import TypeAlias

from meshwright.compiler.graph.ir import Arg, MeshOp, Node
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.layout.layout import Dim

COUNTED = {"all_gather_replicated": "all_gather"}
"""Kinds that differ only in what becomes of their gradient count as one."""

TransferKey: TypeAlias = tuple[Node, str, tuple[tuple[str, Arg], ...], tuple[Dim, ...]]
"""The operand, the kind, its axes and options, and how the result is cut."""


def moves(node: Node) -> bool:
    """Whether a node is a collective that moves bytes."""
    return (
        isinstance(node.op, MeshOp)
        and node.op.name in COLLECTIVES
        and COLLECTIVES[node.op.name].moves
    )


def counted(node: Node) -> str:
    """The kind that a collective counts as."""
    assert isinstance(node.op, MeshOp)
    return COUNTED.get(node.op.name, node.op.name)


def transfer_key(node: Node) -> TransferKey:
    """What two collectives that share one transfer have in common."""
    return (node.args[0], counted(node), tuple(sorted(node.kwargs.items())), node.placed.dims)
