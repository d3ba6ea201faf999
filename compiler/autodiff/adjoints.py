"""Adjoints written by hand: of collectives, from their types, and of linear maps."""

from __future__ import annotations

import math

import torch

from meshwright.compiler.autodiff.vjp import VjpContext, adjoint
from meshwright.compiler.graph.ir import MeshOp, Node, Op
from meshwright.compiler.graph.transfers import collective_kind
from meshwright.compiler.placing.composite import Cotangents

aten = torch.ops.aten


def collective_adjoint(context: VjpContext) -> Node:
    """The adjoint of a collective takes the cotangent to the dual of its operand's layout."""
    node = context.node
    kind = collective_kind(node.op)
    assert kind is not None
    kwargs = dict(node.kwargs)
    if "shift" in kwargs:
        kwargs["shift"] = -kwargs["shift"]
    return context.emitter.builder.emit(
        MeshOp(kind.adjoint),
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
