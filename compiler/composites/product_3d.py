"""Products of matrices in blocks over three axes, by gathers and one scattered sum.

Before:  product_3d: f32[8@(x, z), 32@y] = mesh::product_3d(slice, vary, True, x, y, z)
After:   all_gather_replicated_1: f32[8@x, 16@z]  = all_gather_replicated(slice, y)
         panel_product: f32[8@x, 32@y] partial(z) =
             mesh::panel_product(all_gather_replicated_1, vary, nt)
         reduce_scatter: f32[8@(x, z), 32@y]      = reduce_scatter(panel_product, z)

Activations `[m@(x, y), k@z]` are gathered over y, and multiplied by `[k@z, n@y]`, which is the same
along x; the sum over z leaves `[m@(x, z), n@y]`. So y and z change places from one product to the
next. What is saved is what was there before it was gathered.
Elsewhere: Bian et al., 2105.14450.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.compiler.composites.block_products import (
    BlockProduct,
    BlockSum,
    TransposedBlockProduct,
    matrix,
)
from meshwright.compiler.composites.grid import Dims, over, placement, renamed, rows_over
from meshwright.compiler.composites.panels import PanelProduct
from meshwright.compiler.graph.ir import MeshOp, Node
from meshwright.compiler.layout.factors import Dim
from meshwright.compiler.placing.composite import LoweringContext, composite
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement

_OPS = MeshOp("product_3d"), MeshOp("product_3d_transposed"), MeshOp("product_3d_sum")


def _rows(operand: Operand, call: Call, axis: str, other: str) -> Dims:
    """The leading dims of activations over x and `axis`, and whole over the `other`."""
    return rows_over(operand.layout.dims[:-1], (call.args[3], axis), other, call.mesh)


def _grid(call: Call) -> tuple[Dim, Dim]:
    """The dims of the matrix that is the second operand, over z and over y."""
    found, (is_transposed, _, y, z) = call.operands[1], call.args[2:]
    rows, columns = found.layout.dims[:: -1 if is_transposed else 1]
    return over(rows, z), over(columns, y)


def _swapped(leading: Dims, old: str, new: str) -> Dims:
    return tuple(renamed(dim, old, new) for dim in leading)


@composite
class Product3d(BlockProduct):
    """`product_3d(a[..., k], B[k, n], is_transposed, x, y, z) -> [..., n]`."""

    op, ops = _OPS[0], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        is_transposed, _, y, z = call.args[2:]
        inner, columns = _grid(call)
        leading = _rows(call.operands[0], call, y, z)
        given = (*leading, inner), matrix(inner, columns, is_transposed)
        return (placement(call, given, (*_swapped(leading, y, z), columns), (y, z)),)

    def lower(self, context: LoweringContext) -> Node:
        a, b, is_transposed, _, y, _ = context.args
        form = "nt" if is_transposed else "nn"
        product = context.call(PanelProduct.op, _gathered(context, a, y), b, form)
        return context.reshard(product, context.node.placed)


@composite
class Product3dTransposed(TransposedBlockProduct):
    """`product_3d_transposed(c[..., n], B[k, n], is_transposed, x, y, z) -> [..., k]`."""

    op, ops = _OPS[1], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        is_transposed, _, y, z = call.args[2:]
        result, inner = _grid(call)
        leading = _rows(call.operands[0], call, z, y)
        given = (*leading, inner), matrix(result, inner, is_transposed)
        return (placement(call, given, (*_swapped(leading, z, y), result), (y, z)),)

    def lower(self, context: LoweringContext) -> Node:
        c, b, is_transposed, _, _, z = context.args
        form = "nn" if is_transposed else "nt"
        product = context.call(PanelProduct.op, _gathered(context, c, z), b, form)
        return context.reshard(product, context.node.placed)


@composite
class Product3dSum(BlockSum):
    """`product_3d_sum(a[..., k], c[..., n], is_transposed, x, y, z) -> B[k, n]`: pending over x."""

    op, ops = _OPS[2], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        (a, c), (is_transposed, _, y, z) = call.operands, call.args[2:]
        leading = _rows(a, call, y, z)
        inner, columns = over(a.layout.dims[-1], z), over(c.layout.dims[-1], y)
        given = (*leading, inner), (*_swapped(leading, y, z), columns)
        return (placement(call, given, matrix(inner, columns, is_transposed), (y, z)),)

    def lower(self, context: LoweringContext) -> Node:
        a, c, is_transposed, _, y, z = context.args
        pair = _gathered(context, a, y), _gathered(context, c, z)
        return context.call(PanelProduct.op, *pair[:: -1 if is_transposed else 1], "tn")


def _gathered(context: LoweringContext, value: Node, axis: str) -> Node:
    """The value, gathered for one product: what the backward gathers again is not saved."""
    return context.reshard(value, value.placed.drop_split((axis,), context.mesh), anew=True)
