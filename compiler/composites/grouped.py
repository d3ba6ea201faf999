"""Products of rows with matrices, one per group: each row meets the matrix of its group."""

from __future__ import annotations

from functools import partial

import torch

from meshwright.compiler.graph.ir import MeshOp, Node, NodeType, TensorType
from meshwright.compiler.kernels import grouped as kernels
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    composite,
)
from meshwright.compiler.placing.rules.notation import Call, Letters, Spec

aten = torch.ops.aten

_EACH = (frozenset({0}), frozenset({1}))


_ROWS: tuple[Letters, ...] = (("r", "k"), ("r", "t", "k"), ("g", "q", "m", "k"))
"""The letters of rows by their number of dims."""


def _letters(call: Call) -> tuple[Letters, Letters, Letters]:
    """The letters of the rows that are multiplied, of the matrices and of the groups."""
    rows = _ROWS[len(call.operands[0].type.shape) - 2]
    if rows[0] == "g":
        return rows, ("q", "e", "k", "n"), rows[:-1]
    return rows, ("e", "k", "n"), ("r", "t")


@composite
class GroupedMM(Composite):
    """`grouped_mm(x, weight, group)`: `x[r, k]` or `x[r, t, k]`, `weight[e, k, n]` and
    `group[r, t]` give `[r, t, n]`.

    In blocks, `x[g, q, m, k]`, `weight[q, e, k, n]` and `group[g, q, m]` give `[g, q, m, n]`.
    Groups from e on have no matrix, and give zeros.
    """

    op = MeshOp("grouped_mm")

    def rule(self, call: Call) -> Spec:
        terms = _letters(call)
        return Spec(terms, ((*terms[2], "n"),), whole=frozenset("e"), linear=_EACH)

    def result_type(self, x: TensorType, weight: TensorType, group: TensorType) -> NodeType:
        return TensorType((*group.shape, weight.shape[-1]), x.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        """y[r, t] = x[r, t] w[group[r, t]]: dx = g w[group]^T; dw sums x^T g by group."""
        x, weight, group = context.operands
        dx = dweight = None
        if x.requires_grad:
            dx = _back(context, context.grad, weight, group)
        if weight.requires_grad:
            num_groups = weight.tensor.shape[-3]
            dweight = context.call(GroupedMMWeight.op, x, context.grad, group, num_groups)
        return dx, dweight, None

    def bind(self, binding: BindingContext) -> Kernel:
        return kernels.grouped_mm


@composite
class GroupedMMWeight(Composite):
    """`grouped_mm_weight(x, grad, group, num_groups)`: `x`, `grad[r, t, n]` and `group[r, t]` give
    `[e, k, n]`, a sum over all rows; in blocks, `[q, e, k, n]`."""

    op = MeshOp("grouped_mm_weight")

    def rule(self, call: Call) -> Spec:
        rows, matrices, group = _letters(call)
        return Spec((rows, (*group, "n"), group), (matrices,), linear=_EACH)

    def result_type(
        self, x: TensorType, grad: TensorType, group: TensorType, num_groups: int
    ) -> NodeType:
        blocks = x.shape[1:2] if len(x.shape) == 4 else ()
        return TensorType((*blocks, num_groups, x.shape[-1], grad.shape[-1]), grad.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        """w sums x[r, t]^T y[r, t] by group: dx = y g[group]^T and dy = x g[group]."""
        x, y, group = context.operands
        dx = dy = None
        if x.requires_grad:
            dx = _back(context, y, context.grad, group)
        if y.requires_grad:
            dy = context.call(GroupedMM.op, x, context.grad, group)
        return dx, dy, None

    def bind(self, binding: BindingContext) -> Kernel:
        return partial(kernels.grouped_mm_weight, num_groups=binding.node.args[3])


def _back(context: AdjointContext, grad: Node, weight: Node, group: Node) -> Node:
    """`grad w[group]^T`, summed over t where each row of x stands for t of them."""
    turned = context.call(aten.transpose.int, weight, -2, -1)
    dx = context.call(GroupedMM.op, grad, turned, group)
    shared = len(context.operands[0].tensor.shape) == 2
    return context.call(aten.sum.dim_IntList, dx, (1,)) if shared else dx
