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
    one,
    paired_linear,
    shared_linear,
)
from meshwright.compiler.composites.grid import Dims, over, placement, renamed, rows_over
from meshwright.compiler.composites.panels import products, summed_products
from meshwright.compiler.graph.ir import MeshOp, Node
from meshwright.compiler.layout.factors import Dim
from meshwright.compiler.placing.composite import Lowered, LoweringContext, composite
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement

_OPS = MeshOp("product_3d"), MeshOp("product_3d_transposed"), MeshOp("product_3d_sum")


def _rows(operand: Operand, call: Call, axis: str, other: str) -> Dims:
    """The leading dims of activations over x and `axis`, and whole over the `other`."""
    leading, axes = operand.layout.dims[:-1], (call.args[-3], axis)
    return rows_over(leading, axes, other, call.mesh, swapped=True)


def _grid(found: Operand, call: Call) -> tuple[Dim, Dim]:
    """The dims of a matrix, over z and over y."""
    is_transposed, _, y, z = call.args[-4:]
    rows, columns = found.layout.dims[:: -1 if is_transposed else 1]
    return over(rows, z), over(columns, y)


def _swapped(leading: Dims, old: str, new: str) -> Dims:
    return tuple(renamed(dim, old, new) for dim in leading)


@composite
class Product3d(BlockProduct):
    """`product_3d(a[..., k], B[k, n], ..., is_transposed, x, y, z) -> [..., n], ...`."""

    op, ops = _OPS[0], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        (a, *matrices), (is_transposed, _, y, z) = call.operands, call.args[-4:]
        grids = [_grid(each, call) for each in matrices]
        leading = _rows(a, call, y, z)
        given = (*leading, grids[0][0]), *(matrix(*each, is_transposed) for each in grids)
        found = [(*_swapped(leading, y, z), columns) for _, columns in grids]
        return (placement(call, given, found, (y, z), shared_linear(len(given))),)

    def lower(self, context: LoweringContext) -> Lowered:
        a, *matrices, is_transposed, _, y, _ = context.args
        form, left = "nt" if is_transposed else "nn", _gathered(context, a, y)
        found = products(context, (), [(left, each) for each in matrices], form)
        layouts = context.node.layouts
        return one([context.reshard(*each) for each in zip(found, layouts, strict=True)])


@composite
class Product3dTransposed(TransposedBlockProduct):
    """`product_3d_transposed(c[..., n], B[k, n], ..., is_transposed, x, y, z) -> [..., k]`."""

    op, ops = _OPS[1], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        is_transposed, _, y, z = call.args[-4:]
        leading = _rows(call.operands[0], call, z, y)
        given: list[Dims] = []
        for each in call.operands[1::2]:
            result, inner = _grid(each, call)
            given += (*leading, inner), matrix(result, inner, is_transposed)
        found = (*_swapped(leading, z, y), result)
        return (placement(call, given, [found], (y, z), paired_linear(len(given))),)

    def lower(self, context: LoweringContext) -> Lowered:
        *operands, is_transposed, _, _, z = context.args
        left = (_gathered(context, each, z) for each in operands[::2])
        pairs, form = zip(left, operands[1::2], strict=True), "nn" if is_transposed else "nt"
        return context.reshard(summed_products(context, pairs, form), context.node.placed)


@composite
class Product3dSum(BlockSum):
    """`product_3d_sum(a[..., k], c[..., n], ..., is_transposed, x, y, z) -> B[k, n], ...`: pending
    over x."""

    op, ops = _OPS[2], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        (a, *others), (is_transposed, _, y, z) = call.operands, call.args[-4:]
        leading = _rows(a, call, y, z)
        inner, columns = over(a.layout.dims[-1], z), [over(c.layout.dims[-1], y) for c in others]
        given = (*leading, inner), *((*_swapped(leading, y, z), each) for each in columns)
        found = [matrix(inner, each, is_transposed) for each in columns]
        return (placement(call, given, found, (y, z), shared_linear(len(given))),)

    def lower(self, context: LoweringContext) -> Lowered:
        a, *others, is_transposed, _, y, z = context.args
        left = _gathered(context, a, y)
        pairs = [(left, _gathered(context, each, z)) for each in others]
        if is_transposed:
            pairs = [(c, a) for a, c in pairs]
        return one(products(context, (), pairs, "tn"))


def _gathered(context: LoweringContext, value: Node, axis: str) -> Node:
    """The value, gathered for one product: what the backward gathers again is not saved."""
    return context.reshard(value, value.placed.drop_split((axis,), context.mesh), anew=True)
