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
the next are under way, and no others: a rank holds two panels of each operand at most. Where there
are no more than two, and small ones, both are gathered at once, and results scattered.
Elsewhere: SUMMA (van de Geijn and Watts, 1997); Optimus (2104.05343), Tesseract (2105.14500).
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
from meshwright.compiler.composites.panels import Panels, products, summed_products
from meshwright.compiler.graph.ir import MeshOp, Node
from meshwright.compiler.layout.factors import Dim, cut
from meshwright.compiler.placing.composite import Lowered, LoweringContext, composite
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement


def _grid(found: Operand, is_transposed: bool, row: str, col: str) -> tuple[Dim, Dim]:
    """The dims of a matrix: rows in equal blocks over `row`, and columns over `col`."""
    rows, columns = (1, 0) if is_transposed else (0, 1)
    return cut(found.type.shape[rows], row), over(found.layout.dims[columns], col)


_OPS = MeshOp("summa"), MeshOp("summa_transposed"), MeshOp("summa_sum")


@composite
class Summa(BlockProduct):
    """`summa(x[..., k], B[k, n], ..., is_transposed, rows, col) -> [..., n], ...`; the axes `rows`
    split the leading dims of activations, and the last of them is `row`."""

    op, ops = _OPS[0], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        (x, *matrices), (is_transposed, rows, col) = call.operands, call.args[-3:]
        grids = [_grid(each, is_transposed, rows[-1], col) for each in matrices]
        leading = rows_over(x.layout.dims[:-1], rows, col, call.mesh)
        inner = renamed(grids[0][0], rows[-1], col)
        given = (*leading, inner), *(matrix(*each, is_transposed) for each in grids)
        found = [(*leading, columns) for _, columns in grids]
        linear = shared_linear(len(given))
        return (placement(call, given, found, (rows[-1], col), linear),)

    def lower(self, context: LoweringContext) -> Lowered:
        x, *matrices, is_transposed, (*_, row), col = context.args
        last = len(x.tensor.shape) - 1
        inner, form = (1, "nt") if is_transposed else (0, "nn")
        panels = Panels(context, row, col)

        def fetch(step: int, after: Node | None) -> tuple[Node, ...]:
            a = panels.broadcast(x, last, col, step, after)
            return a, *(panels.broadcast(each, inner, row, step, after) for each in matrices)

        def add(step: int, totals: tuple[Node, ...], a: Node, *b: Node) -> tuple[Node, ...]:
            return products(context, totals, [(a, each) for each in b], form)

        return one(panels.added(fetch, add))


@composite
class SummaTransposed(TransposedBlockProduct):
    """`summa_transposed(x[..., n], B[k, n], ..., is_transposed, rows, col) -> [..., k]`."""

    op, ops = _OPS[1], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        factors, matrices = call.operands[::2], call.operands[1::2]
        is_transposed, rows, col = call.args[-3:]
        leading = rows_over(factors[0].layout.dims[:-1], rows, col, call.mesh)
        given: list[Dims] = []
        for each in matrices:
            result, inner = _grid(each, is_transposed, rows[-1], col)
            given += (*leading, inner), matrix(result, inner, is_transposed)
        found = (*leading, renamed(result, rows[-1], col))
        linear = paired_linear(len(given))
        return (placement(call, given, [found], (rows[-1], col), linear),)

    def lower(self, context: LoweringContext) -> Lowered:
        *operands, is_transposed, (*_, row), col = context.args
        factors, matrices = operands[::2], operands[1::2]
        result, form = (1, "nn") if is_transposed else (0, "nt")
        panels = Panels(context, row, col)

        def fetch(step: int, after: Node | None) -> tuple[Node, ...]:
            return tuple(panels.broadcast(each, result, row, step, after) for each in matrices)

        def multiply(step: int, *given: Node) -> Iterable[Node]:
            yield summed_products(context, zip(factors, given, strict=True), form)

        return one(panels.reduced(fetch, multiply, len(factors[0].tensor.shape) - 1, col))


@composite
class SummaSum(BlockSum):
    """`summa_sum(x[..., k], y[..., n], ..., is_transposed, rows, col) -> B[k, n], ...`."""

    op, ops = _OPS[2], _OPS

    def rule(self, call: Call) -> Iterable[Placement]:
        (x, *others), (is_transposed, rows, col) = call.operands, call.args[-3:]
        leading = rows_over(x.layout.dims[:-1], rows, col, call.mesh)
        inner, columns = cut(x.type.shape[-1], col), [over(y.layout.dims[-1], col) for y in others]
        given = (*leading, inner), *((*leading, each) for each in columns)
        found = renamed(inner, col, rows[-1])
        results = [matrix(found, each, is_transposed) for each in columns]
        linear = shared_linear(len(given))
        return (placement(call, given, results, (rows[-1], col), linear),)

    def lower(self, context: LoweringContext) -> Lowered:
        x, *others, is_transposed, (*_, row), col = context.args
        last = len(x.tensor.shape) - 1
        panels = Panels(context, row, col)

        def fetch(step: int, after: Node | None) -> tuple[Node, ...]:
            # Activations can be there long before the cotangents.
            return (panels.broadcast(x, last, col, step, after or others[-1]),)

        def multiply(step: int, panel: Node) -> Iterable[Node]:
            for each in others:
                pair = (each, panel) if is_transposed else (panel, each)
                yield summed_products(context, [pair], "tn")

        return one(panels.reduced(fetch, multiply, 1 if is_transposed else 0, row))
