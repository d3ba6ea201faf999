"""Activations in blocks over a grid of ranks, where what gives them would leave their rows whole.

Before:  rows_in_blocks: f32[8@(x, y), 8, 32@z] = mesh::rows_in_blocks(reduce_scatter, [x, y], z)
After:   nothing: it is its operand

A lookup in a table over two of three axes is a sum over one of them, which an `all_reduce` would
give whole to all of its ranks, and every sum after it; asked for in blocks, it is a
`reduce_scatter`.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.compiler.composites.grid import over, placement, rows_over
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.placing.composite import (
    AdjointContext,
    Composite,
    Cotangents,
    LoweringContext,
    composite,
)
from meshwright.compiler.placing.rules.notation import Call, Placement


@composite
class RowsInBlocks(Composite):
    """`rows_in_blocks(x[..., d], rows, col)` is `x`, with leading dims over the axes `rows` and
    features over `col`."""

    op = MeshOp("rows_in_blocks")

    def rule(self, call: Call) -> Iterable[Placement]:
        *leading, width = call.operands[0].layout.dims
        rows, col = call.args[1:]
        dims = *rows_over(leading, rows, col, call.mesh), over(width, col)
        return (placement(call, [dims], [dims], (), (frozenset({0}),)),)

    def result_type(self, x: TensorType, *rest: Arg) -> NodeType:
        return x

    def adjoint(self, context: AdjointContext) -> Cotangents:
        return [context.grad]

    def lower(self, context: LoweringContext) -> Node:
        x: Node = context.args[0]
        return x
