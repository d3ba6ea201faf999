"""Adjoints written by hand: of collectives, from their types; of composites; of linear maps."""

from __future__ import annotations

import math

import torch

from meshwright.compiler.autodiff.vjp import Cotangents, VjpContext, adjoint
from meshwright.compiler.graph.ir import MeshOp, Node, Op
from meshwright.compiler.layout.collectives import COLLECTIVES

aten = torch.ops.aten


def collective_adjoint(context: VjpContext) -> Node:
    """The adjoint of a collective takes the cotangent to the dual of its operand's layout."""
    node = context.node
    assert isinstance(node.op, MeshOp)
    kwargs = dict(node.kwargs)
    if "shift" in kwargs:
        kwargs["shift"] = -kwargs["shift"]
    return context.emitter.builder.emit(
        MeshOp(COLLECTIVES[node.op.name].adjoint),
        (context.grad,),
        kwargs,
        type=node.type,
        layout=context.operands[0].placed.dual(),
        origin=context.origin,
    )


@adjoint(aten.linear.default)
def _linear(context: VjpContext) -> Cotangents:
    """y = x w^T + b: dx = g w; dw = g^T x and db = sum g, over all rows."""
    x, weight, *bias = context.operands
    grad, rows = context.grad, math.prod(x.tensor.shape[:-1])
    flat = context.call(aten.view.default, grad, (rows, weight.tensor.shape[0]))
    dx = dweight = None
    if x.requires_grad:
        dx = context.call(aten.matmul.default, grad, weight)
    if weight.requires_grad:
        across = context.call(aten.view.default, x, (rows, x.tensor.shape[-1]))
        dweight = context.call(aten.mm.default, context.call(aten.t.default, flat), across)
    return (dx, dweight, *(_row_sum(context, flat) if b.requires_grad else None for b in bias))


def _row_sum(context: VjpContext, flat: Node) -> Node:
    return context.call(aten.sum.dim_IntList, flat, (0,))


@adjoint(aten.mm.default)
def _mm(context: VjpContext) -> Cotangents:
    a, b = context.operands
    return (
        context.call(aten.mm.default, context.grad, context.call(aten.t.default, b))
        if a.requires_grad
        else None,
        context.call(aten.mm.default, context.call(aten.t.default, a), context.grad)
        if b.requires_grad
        else None,
    )


_WRITES: dict[Op, Op] = {
    aten.as_strided_scatter.default: aten.as_strided.default,
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
}
"""What writes into a part of a tensor, and what reads that part."""


@adjoint(*_WRITES)
def _write(context: VjpContext) -> Cotangents:
    """Nothing comes back from what was replaced; torch's own forgets it, or complex numbers."""
    base, source = context.operands
    where, options = context.node.args[2:], context.node.kwargs
    write = context.node.op
    dbase = dsource = None
    if base.requires_grad:
        zeros = context.call(aten.new_zeros.default, context.grad, source.tensor.shape)
        dbase = context.call(write, context.grad, zeros, *where, **options)
    if source.requires_grad:
        dsource = context.call(_WRITES[write], context.grad, *where, **options)
    return dbase, dsource


@adjoint(MeshOp("embedding"))
def _embedding(context: VjpContext) -> Cotangents:
    weight, index = context.operands
    padding_idx = context.arg(2)
    return (
        context.call(MeshOp("embedding_backward"), context.grad, index, weight, padding_idx),
        None,
    )


@adjoint(MeshOp("cross_entropy"))
def _cross_entropy(context: VjpContext) -> Cotangents:
    logits, target, *weight = context.operands
    _, _, class_weight, *options = context.node.args
    grad = context.call(
        MeshOp("cross_entropy_backward"),
        *(context.grad, logits, target, context.results[1], class_weight, *options),
    )
    return (grad, None, *(None for _ in weight))


@adjoint(MeshOp("norm"))
def _norm(context: VjpContext) -> Cotangents:
    x, weight, bias, _, kind = context.node.args
    _, mean, rstd = context.results
    grads = context.items(
        context.call(MeshOp("norm_backward"), context.grad, x, mean, rstd, weight, bias, kind)
    )
    return tuple(
        grad for grad, operand in zip(grads, (x, weight, bias), strict=True) if operand is not None
    )


@adjoint(MeshOp("attention"))
def _attention(context: VjpContext) -> Cotangents:
    q, k, v, bias, *options = context.node.args
    out, lse = context.results
    wants_bias = bias is not None and bias.requires_grad
    grads = context.items(
        context.call(
            MeshOp("attention_backward"),
            *(context.grad, q, k, v, out, lse, bias, *options, wants_bias),
        )
    )
    return tuple(
        grad for grad, operand in zip(grads, (q, k, v, bias), strict=True) if operand is not None
    )


@adjoint(MeshOp("extend"))
def _extend(context: VjpContext) -> Cotangents:
    """What is added is cut off before it is used: its cotangents are zeros."""
    (x,) = context.operands
    dim = context.arg(1)
    return (context.call(aten.slice.Tensor, context.grad, dim, 0, x.tensor.shape[dim]),)


@adjoint(MeshOp("dropout"))
def _dropout(context: VjpContext) -> Cotangents:
    """The same mask, drawn again from the same hash, on the cotangent."""
    return (context.call(MeshOp("dropout"), context.grad, *context.node.args[1:]),)


@adjoint(MeshOp("grouped_mm"))
def _grouped_mm(context: VjpContext) -> Cotangents:
    """y[r, t] = x[r, t] w[group[r, t]]: dx = g w[group]^T; dw sums x^T g by group."""
    x, weight, group = context.operands
    dx = dweight = None
    if x.requires_grad:
        dx = _grouped_back(context, context.grad, weight, group)
    if weight.requires_grad:
        name, groups = MeshOp("grouped_mm_weight"), weight.tensor.shape[0]
        dweight = context.call(name, x, context.grad, group, groups)
    return dx, dweight, None


@adjoint(MeshOp("grouped_mm_weight"))
def _grouped_mm_weight(context: VjpContext) -> Cotangents:
    """w sums x[r, t]^T y[r, t] by group: dx = y g[group]^T and dy = x g[group]."""
    x, y, group = context.operands
    dx = dy = None
    if x.requires_grad:
        dx = _grouped_back(context, y, context.grad, group)
    if y.requires_grad:
        dy = context.call(MeshOp("grouped_mm"), x, context.grad, group)
    return dx, dy, None


def _grouped_back(context: VjpContext, grad: Node, weight: Node, group: Node) -> Node:
    """`grad w[group]^T`, summed over t where each row of x stands for t of them."""
    turned = context.call(aten.transpose.int, weight, 1, 2)
    dx = context.call(MeshOp("grouped_mm"), grad, turned, group)
    shared = len(context.operands[0].tensor.shape) == 2
    return context.call(aten.sum.dim_IntList, dx, (1,)) if shared else dx


@adjoint(MeshOp("standard_gamma"))
def _standard_gamma(context: VjpContext) -> Cotangents:
    """How a sample moves with its parameter, its quantile held (Figurnov et al., 2018)."""
    (x,) = context.operands
    slope = context.call(aten._standard_gamma_grad.default, x, context.results[0])
    return (context.call(aten.mul.Tensor, context.grad, slope),)


@adjoint(MeshOp("dirichlet"))
def _dirichlet(context: VjpContext) -> Cotangents:
    """Each row keeps its sum of 1; as in `torch.distributions.Dirichlet`."""
    (x,), sample = context.operands, context.results[0]
    assert sample is not None
    total = context.call(aten.sum.dim_IntList, x, (-1,), True)
    total = context.call(aten.expand.default, total, x.tensor.shape)
    slope = context.call(aten._dirichlet_grad.default, sample, x, total)
    along = context.call(aten.mul.Tensor, sample, context.grad)
    along = context.call(aten.sum.dim_IntList, along, (-1,), True)
    across = context.call(aten.sub.Tensor, context.grad, along)
    return (context.call(aten.mul.Tensor, slope, across),)


@adjoint(aten.copy.default)
def _copy(context: VjpContext) -> Cotangents:
    """What is written over has a gradient of zeros; autograd writes down only `copy_`."""
    over, value = context.operands
    zeros = context.call(aten.zeros_like.default, over) if over.requires_grad else None
    if not value.requires_grad:
        return zeros, None
    grad = context.call(aten._to_copy.default, context.grad, dtype=value.tensor.dtype)
    shape, given = grad.tensor.shape, value.tensor.shape
    lead = len(shape) - len(given)
    spread = [i for i, size in enumerate(shape) if i < lead or given[i - lead] != size]
    if spread:
        grad = context.call(aten.sum.dim_IntList, grad, spread, True)
    return zeros, context.call(aten.view.default, grad, given)
