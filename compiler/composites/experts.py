"""Tokens to the slots of experts and back.

Groups of tokens may be split over ranks, and features; the tokens of a group are together. That
experts are on different ranks is a matter of layouts: `[groups@ep, experts, c, d]` resharded to
`[groups, experts@ep, c, d]` is an `all_to_all`.
"""

from __future__ import annotations

from functools import partial

import torch

from meshwright.compiler.graph.ir import Arg, MeshOp, NodeType, TensorType
from meshwright.compiler.kernels import experts as kernels
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    composite,
)
from meshwright.compiler.placing.rules.notation import Row


@composite
class Top(Composite):
    """`top(scores, count)`: places of the largest entries of the last dim, ties in their order."""

    op = MeshOp("top")
    rule = Row("... e! -> ... k!")

    def result_type(self, scores: TensorType, count: int) -> NodeType:
        return TensorType((*scores.shape[:-1], count), torch.int64)

    def bind(self, binding: BindingContext) -> Kernel:
        return partial(kernels.top, count=binding.node.args[1])


@composite
class Positions(Composite):
    """`positions(expert)`: how many equal entries precede each, in the last dim."""

    op = MeshOp("positions")
    rule = Row("... n! -> ... n!")

    def bind(self, binding: BindingContext) -> Kernel:
        return kernels.positions


@composite
class Dispatch(Composite):
    """`dispatch(x, slot, weight, num_slots)`: `x[g, s, d]` and `slot[g, s, k]`, -1 where a choice
    is dropped, give `[g, num_slots, d]`; times `weight[g, s, k]`, or None."""

    op = MeshOp("dispatch")
    rule = Row("g s d, g s k, g? s k -> g n! d", linear=((0,), (2,)))

    def result_type(self, x: TensorType, slot: TensorType, weight: Arg, num_slots: int) -> NodeType:
        return TensorType((x.shape[0], num_slots, x.shape[2]), x.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        _, slot, weight, _ = context.node.args
        assert weight is None, "only a backward has weights"
        return [context.call(Combine.op, context.grad, slot, None), None]

    def bind(self, binding: BindingContext) -> Kernel:
        return partial(kernels.dispatch, num_slots=binding.node.args[3])


@composite
class Combine(Composite):
    """`combine(y, slot, weight)`: `y[g, n, d]`, `slot[g, s, k]` and `weight[g, s, k]`, or None,
    give the weighted sum of the slots of each token, `[g, s, d]`."""

    op = MeshOp("combine")
    rule = Row("g n! d, g s k, g? s k -> g s d", linear=((0,), (2,)))

    def result_type(self, y: TensorType, slot: TensorType, weight: Arg) -> NodeType:
        return TensorType((*slot.shape[:2], y.shape[2]), y.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        y, slot, weight = context.node.args
        grad, num_slots = context.grad, y.tensor.shape[1]
        dy = context.call(Dispatch.op, grad, slot, weight, num_slots) if y.requires_grad else None
        if not weight.requires_grad:
            return [dy, None, None]
        dweight = context.call(CombineWeight.op, grad, y, slot, weight.tensor.dtype)
        return [dy, None, dweight]

    def bind(self, binding: BindingContext) -> Kernel:
        return kernels.combine


@composite
class CombineWeight(Composite):
    """`combine_weight(grad, y, slot, dtype)`: products of `grad[g, s, d]` with the slots of each
    token, `[g, s, k]`."""

    op = MeshOp("combine_weight")
    rule = Row("g s d, g n! d, g s k -> g s k", linear=((0,), (1,)))

    def result_type(
        self, grad: TensorType, y: TensorType, slot: TensorType, dtype: torch.dtype
    ) -> NodeType:
        return TensorType(slot.shape, dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        dtype = binding.node.args[3]
        # Of values of 16 bits, the products are in the type of the weights too.
        return lambda grad, y, slot: kernels.combine_weight(grad.to(dtype), y, slot).to(dtype)
