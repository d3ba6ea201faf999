"""Products of activations `[..., k]` and matrices `[k, n]` that ranks hold in blocks.

Three are closed under differentiation: `A B`, `A B^T`, and `A^T B`, a sum over all leading dims. A
matrix is stored as `[k, n]` or, `is_transposed`, as `[n, k]`: so are the weights of linears. A
family of three says which axes hold what, and how they multiply.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

from meshwright.compiler.composites.grid import Dims
from meshwright.compiler.graph.ir import Arg, MeshOp, NodeType, TensorType
from meshwright.compiler.layout.factors import Dim
from meshwright.compiler.placing.composite import AdjointContext, Composite, Cotangents

Family: TypeAlias = tuple[MeshOp, MeshOp, MeshOp]


def matrix(rows: Dim, columns: Dim, is_transposed: bool) -> Dims:
    """The dims of a matrix as it is stored."""
    return (columns, rows) if is_transposed else (rows, columns)


class BlockProduct(Composite):
    """`op(a[..., k], B[k, n], is_transposed, *axes) -> [..., n]`: `A B`."""

    ops: ClassVar[Family]
    """The operators of the family, in the order above."""

    def result_type(self, a: TensorType, b: TensorType, *rest: Arg) -> NodeType:
        return TensorType((*a.shape[:-1], b.shape[0 if rest[0] else 1]), a.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        (a, b), options = context.operands, context.node.args[2:]
        da = db = None
        if a.requires_grad:
            da = context.call(self.ops[1], context.grad, b, *options)
        if b.requires_grad:
            db = context.call(self.ops[2], a, context.grad, *options)
        return da, db


class TransposedBlockProduct(Composite):
    """`op(a[..., n], B[k, n], is_transposed, *axes) -> [..., k]`: `A B^T`."""

    ops: ClassVar[Family]

    def result_type(self, a: TensorType, b: TensorType, *rest: Arg) -> NodeType:
        return TensorType((*a.shape[:-1], b.shape[1 if rest[0] else 0]), a.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        (a, b), options = context.operands, context.node.args[2:]
        da = db = None
        if a.requires_grad:
            da = context.call(self.ops[0], context.grad, b, *options)
        if b.requires_grad:
            db = context.call(self.ops[2], context.grad, a, *options)
        return da, db


class BlockSum(Composite):
    """`op(a[..., k], c[..., n], is_transposed, *axes) -> B[k, n]`: `A^T C`."""

    ops: ClassVar[Family]

    def result_type(self, a: TensorType, c: TensorType, *rest: Arg) -> NodeType:
        shape = (a.shape[-1], c.shape[-1])
        return TensorType(shape[::-1] if rest[0] else shape, a.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        (a, c), options = context.operands, context.node.args[2:]
        da = dc = None
        if a.requires_grad:
            da = context.call(self.ops[1], c, context.grad, *options)
        if c.requires_grad:
            dc = context.call(self.ops[0], a, context.grad, *options)
        return da, dc
