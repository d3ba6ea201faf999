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

Cuts: TypeAlias = tuple[tuple[Dim, ...], ...]
COUNTS = ("sent", "received")
"""The keywords of a collective of counted rows: how many go to each rank, and come from each."""
_NO_OPTIONS = ("axes", "after", *COUNTS)
"""The keywords of collectives that do not change what ranks do before and after the wire."""
TransferKey: TypeAlias = "Node | tuple[tuple[Arg, ...], str, tuple[tuple[str, Arg], ...], Cuts]"
"""The operands, the kind, its axes and options, and how the results are cut; or the node, if it
shares its transfer with none."""


def collective_kind(op: Op) -> CollectiveKind | None:
    """The row of a collective; None for any other operator."""
    return COLLECTIVES.get(op.name) if isinstance(op, MeshOp) else None


def is_collective(node: Node) -> bool:
    """Whether a node is a collective, including those that only change the layout."""
    return collective_kind(node.op) is not None


def transfers_of(node: Node, mesh: Mesh) -> tuple[Transfer, ...]:
    """What each rank does for a collective, for each of its operands: one, or those sent together.
    A keyword `after` says when it starts, `sent` and `received` have the counts of rows, and these
    are none of them.

    Along sequential axes there is no wire: the result is at hand after the loop. Raises LayoutError
    where the collective does not lead from an operand's layout to its result's.
    """
    assert isinstance(node.op, MeshOp)
    options = {key: value for key, value in node.kwargs.items() if key not in _NO_OPTIONS}
    axes = node.kwargs["axes"]
    found = tuple(
        plan_transfer(node.op.name, axes, source.placed, target, mesh, **options)
        for source, target in zip(node.args, node.layouts, strict=True)
    )
    if mesh.sequential.issuperset(axes):
        return tuple(replace(each, wire=None) for each in found)
    return found


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
    """What two collectives that share one transfer have in common.

    Steps of composites share none: a result that waited for another use would be in memory
    meanwhile.
    """
    kind = collective_kind(node.op)
    if kind is not None and kind.is_step:
        return node
    cuts = tuple(layout.dims for layout in node.layouts)
    return (node.args, counted(node), tuple(sorted(node.kwargs.items())), cuts)


def combines(node: Node, mesh: Mesh) -> bool:
    """Whether a node sums or joins the values of all coordinates of a sequential axis."""
    kind = collective_kind(node.op)
    return kind is not None and kind.combines and bool(mesh.sequential & set(node.kwargs["axes"]))
