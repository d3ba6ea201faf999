"""Lookups in a table of which each rank of a grid holds a block: `[v@row, d@col]`.

Before:  embedding: f32[8@row, 8, 32@col] = mesh::summa_embedding(wte_weight, slice, -1,
             48, [row], col)
After:   broadcast: f32[24, 32@col] varying(row)   = broadcast(wte_weight, row, root=0)
         broadcast_1: f32[24, 32@col] varying(row) = broadcast(wte_weight, row, root=1)
         block_lookup: f32[8@row, 8, 32@col]       = mesh::block_lookup(broadcast, slice, 0, 48)
         add_block_lookup: f32[8@row, 8, 32@col]   = mesh::add_block_lookup(block_lookup,
             broadcast_1, slice, 24, 48)

Blocks of rows are broadcast one after the other, and each rank looks up its own tokens in them; the
gradient of each block is reduced to where it is kept.
Elsewhere: Optimus (2104.05343), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from meshwright.compiler.composites.grid import over, placement, rows_over
from meshwright.compiler.composites.panels import Panels
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.kernels import embedding as kernels
from meshwright.compiler.layout.factors import cut
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    LoweringContext,
    composite,
)
from meshwright.compiler.placing.rules.notation import Call, Placement, Row


@composite
class SummaEmbedding(Composite):
    """`summa_embedding(table[v, d], index, padding_idx, num_rows, rows, col) -> [..., d]`; the axes
    `rows` split the index, and the last of them the table. `num_rows` leave out padding."""

    op = MeshOp("summa_embedding")

    def rule(self, call: Call) -> Iterable[Placement]:
        (table, index), (rows, col) = call.operands, call.args[-2:]
        leading = rows_over(index.layout.dims, rows, col, call.mesh)
        width = over(table.layout.dims[1], col)
        given = (cut(table.type.shape[0], rows[-1]), width), leading
        return (placement(call, given, [(*leading, width)], (rows[-1], col)),)

    def result_type(self, table: TensorType, index: TensorType, *rest: Arg) -> NodeType:
        return TensorType((*index.shape, table.shape[1]), table.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        (table, index), (padding_idx, _, *axes) = context.operands, context.node.args[2:]
        size = table.tensor.shape[0]
        back = context.call(
            SummaEmbeddingBackward.op, context.grad, index, size, padding_idx, *axes
        )
        return back, None

    def lower(self, context: LoweringContext) -> Node:
        table, index, _, num_rows, (*_, row), _ = context.args
        panels = Panels(context, row)
        size = table.tensor.shape[0] // panels.steps

        def add(step: int, totals: tuple[Node, ...], block: Node) -> tuple[Node, ...]:
            op = AddBlockLookup.op if totals else BlockLookup.op
            return (context.call(op, *totals, block, index, step * size, num_rows),)

        (found,) = panels.added(
            lambda step, after: (panels.broadcast(table, 0, row, step, after),), add
        )
        return found


@composite
class SummaEmbeddingBackward(Composite):
    """`summa_embedding_backward(grad[..., d], index, size, padding_idx, rows, col) -> [v, d]`."""

    op = MeshOp("summa_embedding_backward")

    def rule(self, call: Call) -> Iterable[Placement]:
        (grad, index), (size, _, rows, col) = call.operands, call.args[2:]
        leading = rows_over(index.layout.dims, rows, col, call.mesh)
        width = over(grad.layout.dims[-1], col)
        given = (*leading, width), leading
        return (placement(call, given, [(cut(size, rows[-1]), width)], (rows[-1], col)),)

    def result_type(self, grad: TensorType, index: TensorType, *rest: Arg) -> NodeType:
        return TensorType((rest[0], grad.shape[-1]), grad.dtype)

    def lower(self, context: LoweringContext) -> Node:
        grad, index, num_rows, padding_idx, (*_, row), _ = context.args
        panels = Panels(context, row)
        size = num_rows // panels.steps

        def part(step: int) -> Iterable[Node]:
            given = grad, index, size, step * size, padding_idx
            yield context.call(BlockLookupBackward.op, *given)

        (found,) = panels.reduced(lambda step, after: (), part, 0, row)
        return found


@composite
class BlockLookup(Composite):
    """`block_lookup(block[r, d], index, offset, num_rows)`: rows of a block that begins with row
    `offset` of the table; zeros for those of other blocks."""

    op = MeshOp("block_lookup")
    rule = Row("v! d, ... -> ... d", linear=((0,),))

    def result_type(self, block: TensorType, index: TensorType, *rest: Arg) -> NodeType:
        return TensorType((*index.shape, block.shape[1]), block.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        offset, num_rows = binding.node.args[2:]
        return partial(kernels.embedding, num_rows=num_rows, offset=offset)


@composite
class AddBlockLookup(Composite):
    """`add_block_lookup(total, block, index, offset, num_rows)` adds a lookup to `total`, in its
    memory: nothing else may read that."""

    op = MeshOp("add_block_lookup")
    rule = Row("... d, v! d, ... -> ... d", linear=((0, 1),))

    def bind(self, binding: BindingContext) -> Kernel:
        offset, num_rows = binding.node.args[3:]
        look = partial(kernels.embedding, num_rows=num_rows, offset=offset)

        def add(total: Tensor, block: Tensor, index: Tensor) -> Tensor:
            return total.add_(look(block, index))

        return add


@composite
class BlockLookupBackward(Composite):
    """`block_lookup_backward(grad[..., d], index, size, offset, padding_idx) -> [size, d]`: the
    gradient of a block."""

    op = MeshOp("block_lookup_backward")
    rule = Row("... d, ... -> v! d", linear=((0,),))

    def result_type(self, grad: TensorType, index: TensorType, *rest: Arg) -> NodeType:
        return TensorType((rest[0], grad.shape[-1]), grad.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        size, offset, padding_idx = binding.node.args[2:]
        return partial(
            kernels.embedding_backward, num_rows=size, offset=offset, padding_idx=padding_idx
        )
