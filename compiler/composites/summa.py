"""Products of matrices in blocks over two axes: SUMMA, one panel of each matrix at a time.

Before:  summa: f32[8@row, 32@col] = mesh::summa(slice, up_weight, True, [row], col)
After:   broadcast: f32[8@row, 8] varying(col)    = broadcast(slice, col, root=0)
         broadcast_1: f32[32@col, 8] varying(row) = broadcast(up_weight, row, root=0)
         broadcast_2: f32[8@row, 8] varying(col)  = broadcast(slice, col, root=1)
         broadcast_3: f32[32@col, 8] varying(row) = broadcast(up_weight, row, root=1)
         panel_product: f32[8@row, 32@col]        = mesh::panel_product(broadcast,
             broadcast_1, nt)
         add_panel_product: f32[8@row, 32@col]    = mesh::add_panel_product(panel_product,
             broadcast_2, broadcast_3, nt)

The rank at (i, j) holds the block (i, j) of a matrix `B[k@row, n@col]`, and of what is multiplied
by it: activations `[..., k]` have rows over `row` and features over `col`. Three products are
closed under differentiation: `A B`, `A B^T` and `A^T B`. In each step one block column or row of an
operand is broadcast, or one of the result is reduced. While a step multiplies, the broadcasts of
the next are under way, and no others: a rank holds two panels of each operand at most.
Elsewhere: SUMMA (van de Geijn and Watts, 1997); Optimus (2104.05343), Tesseract (2105.14500).
"""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.compiler.composites.block_products import (
    BlockProduct,
    BlockSum,
    TransposedBlockProduct,
    matrix,
)
from meshwright.compiler.composites.grid import over, placement, renamed, rows_over
from meshwright.compiler.composites.panels import (
    AddPanelProduct,
    Multiply,
    PanelProduct,
    Panels,
)
from meshwright.compiler.graph.ir import MeshOp, Node
from meshwright.compiler.layout.factors import Dim, cut
from meshwright.compiler.placing.composite import LoweringContext, composite
from meshwright.compiler.placing.rules.notation import Call, Placement


def _grid(call: Call) -> tuple[Dim, Dim]:
    """The dims of the matrix that is the second operand: rows in equal blocks over the last of the
    `rows`, and columns over `col`."""
    found, (is_transposed, (*_, row), col) = call.operands[1], call.args[2:]
    rows, columns = (1, 0) if is_transposed else (0, 1)
    return cut(found.type.shape[rows], row), over(found.layout.dims[columns], col)


_OPS = MeshOp("summa"), MeshOp("summa_transposed"), MeshOp("summa_sum")


@composite
class Summa(BlockProduct):
    """`summa(x[..., k], B[k, n], is_transposed, rows, col) -> [..., n]`; the axes `rows` split the
    leading dims of activations, and the last of them is `row`."""

    op, ops = _OPS[0], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        (x, _), (is_transposed, rows, col) = call.operands, call.args[2:]
        inner, columns = _grid(call)
        leading = rows_over(x.layout.dims[:-1], rows, col, call.mesh)
        given = (*leading, renamed(inner, rows[-1], col)), matrix(inner, columns, is_transposed)
        return (placement(call, given, (*leading, columns), (rows[-1], col)),)

    def lower(self, context: LoweringContext) -> Node:
        x, weight, is_transposed, (*_, row), col = context.args
        last = len(x.tensor.shape) - 1
        inner, form = (1, "nt") if is_transposed else (0, "nn")
        panels = Panels(context, row, col)

        def fetch(step: int, after: Node | None) -> tuple[Node, ...]:
            a = panels.broadcast(x, last, col, step, after)
            return a, panels.broadcast(weight, inner, row, step, after)

        return panels.added(
            fetch,
            _multiply(context, form),
            lambda _, *given: context.call(AddPanelProduct.op, *given, form),
        )


@composite
class SummaTransposed(TransposedBlockProduct):
    """`summa_transposed(x[..., n], B[k, n], is_transposed, rows, col) -> [..., k]`."""

    op, ops = _OPS[1], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        (x, _), (is_transposed, rows, col) = call.operands, call.args[2:]
        result, inner = _grid(call)
        leading = rows_over(x.layout.dims[:-1], rows, col, call.mesh)
        given = (*leading, inner), matrix(result, inner, is_transposed)
        found = (*leading, renamed(result, rows[-1], col))
        return (placement(call, given, found, (rows[-1], col)),)

    def lower(self, context: LoweringContext) -> Node:
        x, weight, is_transposed, (*_, row), col = context.args
        result, form = (1, "nn") if is_transposed else (0, "nt")
        panels = Panels(context, row, col)

        def fetch(step: int, after: Node | None) -> tuple[Node, ...]:
            return x, panels.broadcast(weight, result, row, step, after)

        return panels.reduced(fetch, _multiply(context, form), len(x.tensor.shape) - 1, col)


@composite
class SummaSum(BlockSum):
    """`summa_sum(x[..., k], y[..., n], is_transposed, rows, col) -> B[k, n]`."""

    op, ops = _OPS[2], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        (x, y), (is_transposed, rows, col) = call.operands, call.args[2:]
        leading = rows_over(x.layout.dims[:-1], rows, col, call.mesh)
        inner, columns = cut(x.type.shape[-1], col), over(y.layout.dims[-1], col)
        given = (*leading, inner), (*leading, columns)
        found = matrix(renamed(inner, col, rows[-1]), columns, is_transposed)
        return (placement(call, given, found, (rows[-1], col)),)

    def lower(self, context: LoweringContext) -> Node:
        x, y, is_transposed, (*_, row), col = context.args
        last = len(x.tensor.shape) - 1
        panels = Panels(context, row, col)

        def fetch(step: int, after: Node | None) -> tuple[Node, ...]:
            # Activations can be there long before the cotangents.
            panel = panels.broadcast(x, last, col, step, after or y)
            return (y, panel) if is_transposed else (panel, y)

        return panels.reduced(fetch, _multiply(context, "tn"), 1 if is_transposed else 0, row)


def _multiply(context: LoweringContext, form: str) -> Multiply:
    return lambda _, *given: context.call(PanelProduct.op, *given, form)
