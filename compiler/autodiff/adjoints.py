"""The backward of one placed call.

A composite has its adjoint in its own file, and that of a collective follows from its type. The
table here has operators whose trace would be wasteful or wrong; any other call is traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch

from meshwright.compiler.autodiff.vjp import VjpContext, traced_cotangents
from meshwright.compiler.graph.ir import TRANSFER, MeshOp, Node, Op
from meshwright.compiler.graph.transfers import collective_kind
from meshwright.compiler.layout.collectives import CollectiveKind
from meshwright.compiler.placing.composite import Cotangents, composite_of

aten = torch.ops.aten


Adjoint: TypeAlias = Callable[[VjpContext], Cotangents]

ADJOINTS: dict[Op, Adjoint] = {}
"""Adjoints written by hand, by operator."""


def cotangents(context: VjpContext) -> Cotangents:
    """Emit the backward of `context.node`; the cotangent of each operand that wants one."""
    op = context.node.op
    if kind := collective_kind(op):
        return [_of_collective(context, kind), *(None,) * (len(context.operands) - 1)]
    known = composite_of(op)
    found = known.adjoint(context) if known else ADJOINTS.get(op, traced_cotangents)(context)
    return context.placed(found)


def adjoint(*ops: Op) -> Callable[[Adjoint], Adjoint]:
    """Register a function as the adjoint of these operators."""

    def register(function: Adjoint) -> Adjoint:
        for op in ops:
            assert op not in ADJOINTS, op
            ADJOINTS[op] = function
        return function

    return register


def _of_collective(context: VjpContext, kind: CollectiveKind) -> Node:
    """The collective that takes the cotangent to the dual of the operand's layout."""
    kwargs = dict(context.node.kwargs)
    if "shift" in kwargs:
        kwargs["shift"] = -kwargs["shift"]
    if kind.by_count:
        kwargs |= {"sent": kwargs["received"], "received": kwargs["sent"]}
    return context.emitter.builder.emit(
        MeshOp(kind.adjoint),
        (context.grad,),
        kwargs,
        type=replace(context.node.tensor, shape=context.operands[0].tensor.shape),
        layout=context.operands[0].placed.dual(),
        origin=context.origin,
    )


@adjoint(TRANSFER)
def _transfer(context: VjpContext) -> Cotangents:
    """The cotangent goes back to the stage that sent the value, in the layout that it has there."""
    (value,) = context.operands
    grad = context.emitter.reshard(context.grad, value.placed.dual(), context.origin)
    return [context.emitter.transfer(grad, context.origin, value.stage)]


@adjoint(aten.linear.default)
def _linear(context: VjpContext) -> Cotangents:
    """y = x w^T + b: dx = g w; dw = g^T x and db = sum g, over all rows."""
    x, weight, *bias = context.operands
    grad, rows = context.grad, math.prod(x.tensor.shape[:-1])
    flat = context.call(aten.view.default, grad, (rows, weight.tensor.shape[0]))
    dx = dweight = dbias = None
    if x.requires_grad:
        dx = context.call(aten.matmul.default, grad, weight)
    if weight.requires_grad:
        across = context.call(aten.view.default, x, (rows, x.tensor.shape[-1]))
        dweight = context.call(aten.mm.default, context.call(aten.t.default, flat), across)
    if bias and bias[0].requires_grad:
        dbias = context.call(aten.sum.dim_IntList, flat, (0,))
    return dx, dweight, *([dbias] if bias else [])


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
    """What was replaced has a cotangent of zeros; torch's own adjoints get that, or complex
    numbers, wrong."""
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
    """What is overwritten has a cotangent of zeros; autograd knows `copy_` alone."""
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
