"""The layouts that the plan wrote for weights, as their views have them."""

from __future__ import annotations

import torch

from meshwright.compiler.graph.ir import INPUT, Graph, Node
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.placing.candidates import allowed_on
from meshwright.passes.statements.draft import Draft, input_key

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten._to_copy.default,
}
"""Operators through which a parameter's layout stays the one that the plan wrote."""


def written(draft: Draft, graph: Graph) -> dict[Node, Layout]:
    """By input of `graph` that the plan lays out, and by view of one: the layout in which operators
    use it."""
    found: dict[Node, Layout] = {}
    for node in graph.nodes:
        if node.op == INPUT:
            pin = draft.inputs.get(input_key(node))
            if pin:
                found[node] = pin.layout.canonical(draft.mesh)
        elif node.op in VIEWS and node.args[0] in found:
            layout = _viewed(node, found[node.args[0]], draft)
            if layout is not None:
                found[node] = layout
    return found


def _viewed(node: Node, layout: Layout, draft: Draft) -> Layout | None:
    """The layout of a view of a value in `layout`, if nothing moves."""
    placements = allowed_on(node, (layout,), draft.mesh)
    found = (each for each in placements if each.operands == (layout,))
    return next((each.results[0] for each in found), None)
