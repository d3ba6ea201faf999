"""Find the input behind a weight that was brought to the layout in which it is used.

Ranks store a parameter in one layout and type, and operators use it in others: the graph's input
has the first, and casts and collectives right behind it lead to the second.
"""

from __future__ import annotations

import torch

from meshwright.compiler.graph.ir import INPUT, TO_DEVICE, TRANSFER, WAIT, MeshOp, Node
from meshwright.compiler.layout.collectives import COLLECTIVES

aten = torch.ops.aten

CUTS = frozenset({aten.slice.Tensor, aten.view.default, aten.cat.default})
"""Operators that cut off what storage adds to a weight."""
_VARY = MeshOp("vary")
USES = frozenset((*map(MeshOp, COLLECTIVES), aten._to_copy.default, TRANSFER, TO_DEVICE, WAIT)) - {
    _VARY
}
"""Operators that bring a weight to the layout, the type, the stage and the device in which it is
used."""


def input_behind(node: Node) -> Node | None:
    """The input that a node is, or that it brings to another layout or element type; None for other
    nodes.

    Cutting off the padding of what is stored is part of the way there.
    """
    whole = _with_padding(node) if node.op in CUTS else node
    if whole.op in USES:
        node = whole
    while node.op in USES or (node.op == _VARY and node is not whole):
        node = node.args[0]
    return node if node.op == INPUT else None


def _with_padding(node: Node) -> Node:
    """The value of which a node, or those before it, may have cut off the padding."""
    if node.op not in CUTS and node.op != _VARY:
        return node
    found = {_with_padding(operand) for operand in node.operands()}
    return found.pop() if len(found) == 1 else node
