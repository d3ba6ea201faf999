"""A dim made longer by repeating its last entry: padding that stays in an operator's domain."""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.compiler.graph.ir import MeshOp, NodeType, TensorType
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    composite,
)
from meshwright.compiler.placing.rules.notation import FIRST, Call, Spec, numbered, with_letter

aten = torch.ops.aten


@composite
class Extend(Composite):
    """`extend(x, dim, size)` repeats the last entry of the dim, which is whole, up to `size`."""

    op = MeshOp("extend")

    def rule(self, call: Call) -> Spec:
        letters, dim = numbered("x", len(call.operands[0].type.shape)), call.arg(1)
        result = with_letter(letters, dim, "r")
        return Spec((letters,), (result,), whole=frozenset({letters[dim]}), linear=FIRST)

    def result_type(self, x: TensorType, dim: int, size: int) -> NodeType:
        return TensorType((*x.shape[:dim], size, *x.shape[dim + 1 :]), x.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        """What is added is cut off before it is used: its cotangents are zeros."""
        x, dim, _ = context.node.args
        return [context.call(aten.slice.Tensor, context.grad, dim, 0, x.tensor.shape[dim])]

    def bind(self, binding: BindingContext) -> Kernel:
        _, dim, size = binding.node.args
        return lambda x: extend(x, dim, size)


def extend(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with its last entry of `dim` repeated until there are `size`."""
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    shape = (*x.shape[:dim], size - x.shape[dim], *x.shape[dim + 1 :])
    return torch.cat((x, last.expand(shape)), dim)
