"""Find the input behind a weight that was brought to the layout in which it is used.

Ranks store a parameter in one layout and operators use it in another: the graph's input has the
first, and collectives right behind it lead to the second.
"""

from __future__ import annotations

import torch

from meshwright.compiler.graph.ir import INPUT, MeshOp, Node
from meshwright.compiler.layout.collectives import COLLECTIVES

_USES = frozenset(MeshOp(name) for name in COLLECTIVES if name != "vary")


def input_behind(node: Node) -> Node | None:
    """The input that a node is, or that it brings to another layout; None for other nodes.

    A slice that cuts off the padding of what is stored is part of the way there.
    """
    if node.op == torch.ops.aten.slice.Tensor and node.args[0].op in _USES:
        node = node.args[0]
    while node.op in _USES:
        node = node.args[0]
    return node if node.op == INPUT else None
