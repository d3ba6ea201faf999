"""Layer norm and RMS norm over the last dim; where that is split, statistics are exchanged.

Before:  norm: (f32[8, 16@tp], f32[8], f32[8]) = mesh::norm(linear, slice, slice_1, 1e-05, layer)
After:   norm_stats: f32[2@tp, 2, 8]           = mesh::norm_stats(linear, layer)
         all_gather_replicated: f32[2, 2, 8]   = all_gather_replicated(norm_stats, tp)
         norm_finish: (f32[8, 16@tp], f32[8],
             f32[8])                           = mesh::norm_finish(linear,
             all_gather_replicated, slice, slice_1, 1e-05, layer)

The backward has one sum over ranks, of two numbers per row.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from meshwright.compiler.composites.statistics import gathered, per_rank
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.kernels import norm as kernels
from meshwright.compiler.kernels.blocks import accumulation_dtype
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    LoweringContext,
    composite,
)
from meshwright.compiler.placing.rules.notation import Call, Row, Spec


def _statistic(x: TensorType) -> TensorType:
    """A number per row."""
    return TensorType(x.shape[:-1], accumulation_dtype(x.dtype))


def _fuses(node: Node, kind: Arg) -> bool:
    """Whether what torch takes a norm apart into has results of the types that its kernel has; of a
    layer norm, where all is of one type in which it also computes."""
    types = {operand.tensor.dtype for operand in node.operands()}
    return kind == "rms" or types in ({torch.float32}, {torch.float64})


@composite
class Norm(Composite):
    """`norm(x, weight, bias, eps, kind) -> (y, mean, rstd)`; "rms" has no bias and no mean."""

    op = MeshOp("norm")
    rule = Row("... n~, n?, n? -> ... n, ..., ...")

    def result_type(self, x: TensorType, *rest: Arg) -> NodeType:
        return (x, _statistic(x) if rest[-1] == "layer" else None, _statistic(x))

    def adjoint(self, context: AdjointContext) -> Cotangents:
        x, weight, bias, _, kind = context.node.args
        _, mean, rstd = context.results
        bias_dtype = None if bias is None else bias.tensor.dtype
        grads = context.items(
            context.call(NormBackward.op, context.grad, x, mean, rstd, weight, kind, bias_dtype)
        )
        operands = (x, weight, bias)
        return [grad for grad, x in zip(grads, operands, strict=True) if x is not None]

    def lower(self, context: LoweringContext) -> Node | None:
        x, weight, bias, eps, kind = context.args
        axes = dim_axes(x.placed.dims[-1])
        if not axes:
            return None
        stats = gathered(context, axes, NormStats.op, x, kind)
        return context.call(NormFinish.op, x, stats, weight, bias, eps, kind)

    def fuses(self, node: Node) -> bool:
        return _fuses(node, node.args[4])

    def bind(self, binding: BindingContext) -> Kernel:
        eps, kind = binding.node.args[3:]
        if kind == "layer":
            return partial(kernels.layer_norm, eps=eps)

        def rms(x: Tensor, weight: Tensor | None, bias: None) -> tuple[Tensor | None, ...]:
            y, rstd = kernels.rms_norm(x, weight, eps)
            return y, None, rstd

        return rms


@composite
class NormBackward(Composite):
    """`norm_backward(grad, x, mean, rstd, weight, kind, bias_dtype) -> (dx, dweight, dbias)`;
    `bias_dtype` is None where there is no bias."""

    op = MeshOp("norm_backward")
    rule = Row("... n~, ... n, ...?, ..., n? -> ... n, n, n", linear=((0,),))

    def result_type(self, grad: TensorType, x: TensorType, *rest: Arg) -> NodeType:
        _, _, weight, _, bias_dtype = rest
        return (x, weight, bias_dtype and TensorType(x.shape[-1:], bias_dtype))

    def lower(self, context: LoweringContext) -> Node | None:
        axes = dim_axes(context.args[1].placed.dims[-1])
        if not axes:
            return None
        sums = context.call(NormBackwardSums.op, *context.args[:-1])
        total = context.reshard(sums, sums.placed.drop_partial(axes))
        return context.call(NormBackwardApply.op, total, *context.args)

    def fuses(self, node: Node) -> bool:
        return _fuses(node, node.args[5])

    def bind(self, binding: BindingContext) -> Kernel:
        *_, kind, bias_dtype = binding.node.args
        if kind == "layer":
            return partial(kernels.layer_norm_backward, bias_dtype=bias_dtype)

        def rms(
            grad: Tensor, x: Tensor, mean: None, rstd: Tensor, weight: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            return (*kernels.rms_norm_backward(grad, x, rstd, weight), None)

        return rms


@composite
class NormStats(Composite):
    """`norm_stats(x, kind) -> [ranks, k, ...]`: what a norm needs of the part on each rank."""

    op = MeshOp("norm_stats")

    def rule(self, call: Call) -> Spec:
        return per_rank(Row("... n~ -> r k! ...")(call), call, "n")

    def result_type(self, x: TensorType, kind: str) -> NodeType:
        count = 2 if kind == "layer" else 1
        return TensorType((1, count, *x.shape[:-1]), accumulation_dtype(x.dtype))

    def bind(self, binding: BindingContext) -> Kernel:
        if binding.node.args[1] == "layer":
            return lambda x: kernels.norm_stats(x).unsqueeze(0)
        return lambda x: kernels.rms_stats(x)[None, None]


@composite
class NormFinish(Composite):
    """`norm_finish(x, stats, weight, bias, eps, kind) -> (y, mean, rstd)`."""

    op = MeshOp("norm_finish")
    rule = Row("... n~, r! k! ..., n?, n? -> ... n, ..., ...")

    def result_type(self, x: TensorType, *rest: Arg) -> NodeType:
        return (x, _statistic(x) if rest[-1] == "layer" else None, _statistic(x))

    def bind(self, binding: BindingContext) -> Kernel:
        eps, kind = binding.node.args[4:]
        size = binding.operand(0).tensor.shape[-1]

        def finish(
            x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            mean: Tensor | None = None
            if kind == "layer":
                mean, rstd = kernels.norm_combine(stats, x.shape[-1], eps)
            else:
                rstd = kernels.rms_combine(stats[:, 0], size, eps)
            return kernels.norm_apply(x, mean, rstd, weight, bias), mean, rstd

        return finish


@composite
class NormBackwardSums(Composite):
    """`norm_backward_sums(grad, x, mean, rstd, weight, kind) -> [2, ...]`: sums over the part of
    each row here, pending."""

    op = MeshOp("norm_backward_sums")
    rule = Row("... n, ... n, ...?, ..., n? -> t! ...", linear=((0,),))

    def result_type(self, grad: TensorType, x: TensorType, *rest: Arg) -> NodeType:
        return TensorType((2, *x.shape[:-1]), accumulation_dtype(x.dtype))

    def bind(self, binding: BindingContext) -> Kernel:
        return kernels.norm_backward_sums


@composite
class NormBackwardApply(Composite):
    """`norm_backward_apply(sums, grad, x, mean, rstd, weight, ...)`, as `norm_backward`."""

    op = MeshOp("norm_backward_apply")
    rule = Row("t! ..., ... n~, ... n, ...?, ..., n? -> ... n, n, n", linear=((0, 1),))

    def result_type(self, sums: TensorType, *backward: Arg) -> NodeType:
        return NormBackward().result_type(*backward)

    def bind(self, binding: BindingContext) -> Kernel:
        size, bias_dtype = binding.operand(2).tensor.shape[-1], binding.node.args[-1]
        return partial(kernels.norm_backward_apply, n=size, bias_dtype=bias_dtype)
