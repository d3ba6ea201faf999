"""The collectives of a graph that move bytes, and those that share one transfer."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from meshwright.compiler.graph.ir import Arg, MeshOp, Node, Op
from meshwright.compiler.layout.collectives import (
    COLLECTIVES,
    CollectiveKind,
    Transfer,
    plan_transfer,
)
from meshwright.compiler.layout.factors import Dim
from meshwright.compiler.layout.mesh import Mesh

TransferKey: TypeAlias = tuple[Node, str, tuple[tuple[str, Arg], ...], tuple[Dim, ...]]
"""The operand, the kind, its axes and options, and how the result is cut."""


def collective_kind(op: Op) -> CollectiveKind | None:
    """The row of a collective; None for any other operator."""
    return COLLECTIVES.get(op.name) if isinstance(op, MeshOp) else None


def is_collective(node: Node) -> bool:
    """Whether a node is a collective, including those that only change the layout."""
    return collective_kind(node.op) is not None


def transfer_of(node: Node, mesh: Mesh) -> Transfer:
    """What each rank does for a collective.

    Along sequential axes there is no wire: the result is at hand after the loop. Raises LayoutError
    where the collective does not lead from its operand's layout to its result's.
    """
    assert isinstance(node.op, MeshOp)
    options = {key: value for key, value in node.kwargs.items() if key != "axes"}
    source, axes = node.args[0].placed, node.kwargs["axes"]
    transfer = plan_transfer(node.op.name, axes, source, node.placed, mesh, **options)
    return replace(transfer, wire=None) if mesh.sequential.issuperset(axes) else transfer


def moves(node: Node) -> bool:
    """Whether a node is a collective that moves bytes."""
    kind = collective_kind(node.op)
    return kind is not None and kind.moves


def counted(node: Node) -> str:
    """The kind that a collective counts as."""
    kind = collective_kind(node.op)
    assert kind is not None
    return kind.counted_as


def transfer_key(node: Node) -> TransferKey:
    """What two collectives that share one transfer have in common."""
    return (node.args[0], counted(node), tuple(sorted(node.kwargs.items())), node.placed.dims)


def combines(node: Node, mesh: Mesh) -> bool:
    """Whether a node sums or joins the values of all coordinates of a sequential axis."""
    kind = collective_kind(node.op)
    return kind is not None and kind.combines and bool(mesh.sequential & set(node.kwargs["axes"]))
