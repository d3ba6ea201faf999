"""Products of activations `[..., k]` and matrices `[k, n]` that ranks hold in blocks.

Three are closed under differentiation: `A B`, `A B^T`, and `A^T C`, a sum over all leading dims. A
matrix is stored as `[k, n]` or, `is_transposed`, as `[n, k]`: so are the weights of linears. Each
takes any number of matrices, as if they were one beside the other: what is multiplied by all of
them is sent once, and so is a sum over all of them. A family of three says which axes hold what,
and how they multiply.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, TypeAlias, TypeVar

from meshwright.compiler.composites.grid import Dims
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.layout.factors import Dim
from meshwright.compiler.placing.composite import AdjointContext, Composite, Cotangents
from meshwright.compiler.placing.rules.notation import Group

_T = TypeVar("_T")
Family: TypeAlias = tuple[MeshOp, MeshOp, MeshOp]


def matrix(rows: Dim, columns: Dim, is_transposed: bool) -> Dims:
    """The dims of a matrix as it is stored."""
    return (columns, rows) if is_transposed else (rows, columns)


def one(found: Sequence[_T]) -> _T | tuple[_T, ...]:
    """The results of an operator, or the only one."""
    return found[0] if len(found) == 1 else tuple(found)


def shared_linear(num_operands: int) -> tuple[Group, ...]:
    """Where pending sums pass an operator that multiplies its first operand by each other."""
    return frozenset({0}), frozenset(range(1, num_operands))


def paired_linear(num_operands: int) -> tuple[Group, ...]:
    """The same for one that sums over the products of pairs."""
    return frozenset(range(0, num_operands, 2)), frozenset(range(1, num_operands, 2))


class BlockProduct(Composite):
    """`op(a[..., k], B[k, n], ..., is_transposed, *axes) -> [..., n], ...`: `A B` of each `B`."""

    ops: ClassVar[Family]
    """The operators of the family, in the order above."""

    def result_type(self, a: TensorType, *rest: Arg) -> NodeType:
        matrices, is_transposed = _types(rest)
        column = 0 if is_transposed else 1
        return one([TensorType((*a.shape[:-1], b.shape[column]), a.dtype) for b in matrices])

    def adjoint(self, context: AdjointContext) -> Cotangents:
        (a, *matrices), options = _given(context)
        da = None
        if a.requires_grad:
            pairs = zip(context.grads, matrices, strict=True)
            given = (each for c, b in pairs if c is not None for each in (c, b))
            da = context.call(self.ops[1], *given, *options)
        return da, *_with_each(context, self.ops[2], a, _wanted(context.grads, matrices), options)


class TransposedBlockProduct(Composite):
    """`op(a[..., n], B[k, n], ..., is_transposed, *axes) -> [..., k]`: `A B^T`, summed over the
    pairs of an `a` and a `B`."""

    ops: ClassVar[Family]

    def result_type(self, a: TensorType, *rest: Arg) -> NodeType:
        (b, *_), is_transposed = _types(rest)
        return TensorType((*a.shape[:-1], b.shape[1 if is_transposed else 0]), a.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        operands, options = _given(context)
        factors, matrices = operands[::2], operands[1::2]
        da = _with_each(context, self.ops[0], context.grad, _wanted(matrices, factors), options)
        db = _with_each(context, self.ops[2], context.grad, _wanted(factors, matrices), options)
        return [each for pair in zip(da, db, strict=True) for each in pair]


class BlockSum(Composite):
    """`op(a[..., k], c[..., n], ..., is_transposed, *axes) -> B[k, n], ...`: `A^T C` of each
    `C`."""

    ops: ClassVar[Family]

    def result_type(self, a: TensorType, *rest: Arg) -> NodeType:
        others, is_transposed = _types(rest)
        shapes = [(a.shape[-1], c.shape[-1]) for c in others]
        return one([TensorType(s[:: -1 if is_transposed else 1], a.dtype) for s in shapes])

    def adjoint(self, context: AdjointContext) -> Cotangents:
        (a, *others), options = _given(context)
        da = None
        if a.requires_grad:
            pairs = zip(others, context.grads, strict=True)
            given = (each for c, b in pairs if b is not None for each in (c, b))
            da = context.call(self.ops[1], *given, *options)
        return da, *_with_each(context, self.ops[0], a, _wanted(context.grads, others), options)


def _types(rest: Sequence[Arg]) -> tuple[list[TensorType], bool]:
    """The types of the operands after the first, and the option behind them."""
    found = [each for each in rest if isinstance(each, TensorType)]
    return found, rest[len(found)]


def _given(context: AdjointContext) -> tuple[Sequence[Node], Sequence[Arg]]:
    """The operands of a call, and the options behind them."""
    return context.operands, context.node.args[len(context.operands) :]


def _wanted(given: Iterable[Node | None], operands: Sequence[Node]) -> list[Node | None]:
    """What the cotangent of each operand is computed from, where it wants one."""
    pairs = zip(given, operands, strict=True)
    return [found if operand.requires_grad else None for found, operand in pairs]


def _with_each(
    context: AdjointContext,
    op: MeshOp,
    shared: Node,
    others: Sequence[Node | None],
    options: Sequence[Arg],
) -> Cotangents:
    """What one call gives for a node and each of the others that is there."""
    present = [each for each in others if each is not None]
    if not present:
        return [None] * len(others)
    call = context.call(op, shared, *present, *options)
    found = iter(context.items(call) if len(present) > 1 else [call])
    return [None if each is None else next(found) for each in others]
