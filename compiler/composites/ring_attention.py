"""Attention over a sequence that is split: keys and values go round the ranks of its axes.

`ring_attention` and its backward are lowered to one step for each block of keys, and the exchanges
that bring the block of the next step meanwhile:

Before:  ring_attention: (f32[8, 4, 8@cp, 6], ...) = mesh::ring_attention(q, k, v, None, ...)
After:   ring_step: (f32[8, 4, 8@cp, 6], ...)   = mesh::ring_step(q, k, v, None, None, None, ...)
         permute: f32[8, 4, 8@cp, 6]            = permute(k, cp, shift=1)
         permute_1: f32[8, 4, 8@cp, 6]          = permute(v, cp, shift=1)
         ring_step_1: (f32[8, 4, 8@cp, 6], ...) = mesh::ring_step(q, permute, permute_1, None,
             getitem, getitem_1, ...)

At step t a rank works on the block of the rank t places before it. The gradients of a block's keys
and values go round behind it, each rank adding its own, and one more exchange takes them home.
Elsewhere: Ring Attention (Liu et al., 2310.01889).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from meshwright.compiler.composites.attention import (
    COLUMNS,
    KEY,
    LSE,
    OUT,
    QUERY,
    VALUE,
    attention_spec,
)
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.kernels import ring as kernels
from meshwright.compiler.kernels.blocks import accumulation_dtype
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    Lowered,
    LoweringContext,
    composite,
)
from meshwright.compiler.placing.rules.notation import FIRST, Call, Spec

aten = torch.ops.aten

_OPERANDS = (QUERY, KEY, VALUE, COLUMNS)
_BACKWARD = (OUT, QUERY, KEY, VALUE, OUT, LSE, COLUMNS)


@dataclass(frozen=True, slots=True)
class Ring:
    """The options of attention, and the `axes` round which its keys and values go."""

    is_causal: bool
    scale: float | None
    dropout_p: float
    axes: tuple[str, ...]


@composite
class RingAttention(Composite):
    """`ring_attention(q, k, v, bias, op_id, ring) -> (out, lse)`."""

    op = MeshOp("ring_attention")
    number = 4

    def rule(self, call: Call) -> Spec:
        over = call.args[5].axes
        return attention_spec(call, _OPERANDS, (OUT, LSE), query=0, bias=3, over=over)

    def result_type(self, q: TensorType, k: TensorType, v: TensorType, *rest: Arg) -> NodeType:
        out = TensorType((*q.shape[:-1], v.shape[-1]), q.dtype)
        return (out, TensorType(q.shape[:-1], accumulation_dtype(q.dtype)))

    def adjoint(self, context: AdjointContext) -> Cotangents:
        q, k, v, bias, *options = context.node.args
        wants_bias = bias is not None and bias.requires_grad
        grads = context.items(
            context.call(
                RingAttentionBackward.op,
                *(context.grad, q, k, v, *context.results, bias, *options, wants_bias),
            )
        )
        return grads[: len(context.operands)]

    def lower(self, context: LoweringContext) -> Node | None:
        q, k, v, bias, op_id, ring = context.args
        out = lse = step = None
        count = context.mesh.size(ring.axes)
        for number in range(count):
            if number:
                k, v = (_moved_on(context, x, ring) for x in (k, v))
                out, lse = context.items(step)
            last = number == count - 1
            step = context.call(RingStep.op, q, k, v, bias, out, lse, op_id, ring, number, last)
        return step


@composite
class RingAttentionBackward(Composite):
    """`ring_attention_backward(grad, q, k, v, out, lse, bias, op_id, ring, wants_bias)` gives the
    gradients of q, k, v and the bias."""

    op = MeshOp("ring_attention_backward")
    number = 7

    def rule(self, call: Call) -> Spec:
        over, results = call.args[8].axes, (QUERY, KEY, VALUE, COLUMNS)
        return attention_spec(call, _BACKWARD, results, query=1, bias=6, linear=FIRST, over=over)

    def result_type(self, grad: TensorType, *rest: Arg) -> NodeType:
        q, k, v, _, _, bias = rest[:6]
        return (q, k, v, bias if rest[-1] else None)

    def lower(self, context: LoweringContext) -> Lowered:
        grad, q, k, v, out, lse, bias, op_id, ring, wants_bias = context.args
        dq = dk = dv = dbias = None
        for number in range(context.mesh.size(ring.axes)):
            if number:
                k, v, dk, dv = (_moved_on(context, x, ring) for x in (k, v, dk, dv))
            operands = (grad, q, k, v, out, lse, bias, dq)
            step = context.call(RingStepBackward.op, *operands, op_id, ring, number, wants_bias)
            dq, *own = context.items(step)
            dk, dv, dbias = map(partial(_sum, context), (dk, dv, dbias), own)
        dk, dv = (_moved_on(context, x, ring) for x in (dk, dv))
        found = zip((dq, dk, dv, dbias), context.node.type, strict=True)
        return tuple(x and _cast(context, x, type.dtype) for x, type in found)


@composite
class RingStep(Composite):
    """`ring_step(q, k, v, bias, out, lse, op_id, ring, step, last) -> (out, lse)`: what the blocks
    of the steps so far give, this one included."""

    op = MeshOp("ring_step")
    number = 6

    def rule(self, call: Call) -> Spec:
        terms, over = (*_OPERANDS, OUT, LSE), call.args[7].axes
        return attention_spec(call, terms, (OUT, LSE), query=0, bias=3, over=over)

    def result_type(self, q: TensorType, k: TensorType, v: TensorType, *rest: Arg) -> NodeType:
        kind = accumulation_dtype(q.dtype)
        out = TensorType((*q.shape[:-1], v.shape[-1]), q.dtype if rest[-1] else kind)
        return (out, TensorType(q.shape[:-1], kind))

    def bind(self, binding: BindingContext) -> Kernel:
        block = _block(binding, 0, *binding.node.args[6:9])
        step = partial(kernels.ring_forward, last=binding.node.args[9])
        return lambda *tensors: step(*tensors, block=block())


@composite
class RingStepBackward(Composite):
    """`ring_step_backward(grad, q, k, v, out, lse, bias, dq, op_id, ring, step, wants_bias)` gives
    the gradient of q over the steps so far, and what this one adds to those of the block's keys and
    values and of the bias: `(dq, dk, dv, dbias)`."""

    op = MeshOp("ring_step_backward")
    number = 8

    def rule(self, call: Call) -> Spec:
        terms, results = (*_BACKWARD, QUERY), (QUERY, KEY, VALUE, COLUMNS)
        first = call.args[7] is None
        return attention_spec(
            call,
            terms,
            results,
            query=1,
            bias=6,
            linear=FIRST if first else (frozenset({0, 7}),),
            over=call.args[9].axes,
        )

    def result_type(self, grad: TensorType, *rest: Arg) -> NodeType:
        q, k, v, _, _, bias = rest[:6]
        kind = accumulation_dtype(q.dtype)
        found = (x and TensorType(x.shape, kind) for x in (q, k, v, bias if rest[-1] else None))
        return tuple(found)

    def bind(self, binding: BindingContext) -> Kernel:
        block = _block(binding, 1, *binding.node.args[8:11])
        step = partial(kernels.ring_backward, need_bias_grad=binding.node.args[11])
        return lambda *tensors: step(*tensors, block=block())


def _moved_on(context: LoweringContext, x: Node, ring: Ring) -> Node:
    """What the rank before has, on each rank."""
    return context.collective("permute", x, x.placed, ring.axes, shift=1)


def _sum(context: LoweringContext, total: Node | None, own: Node | None) -> Node | None:
    if total is None or own is None:
        return own
    return context.call(aten.add.Tensor, total, own)


def _cast(context: LoweringContext, x: Node, dtype: torch.dtype) -> Node:
    return x if x.tensor.dtype == dtype else context.call(aten._to_copy.default, x, dtype=dtype)


def _block(
    binding: BindingContext, query: int, op_id: int, ring: Ring, step: int
) -> Callable[[], kernels.Block]:
    """The block of a step on this rank, for each time that the step runs."""
    q, k = binding.operand(query), binding.operand(query + 1)
    ranks, here = binding.mesh.size(ring.axes), binding.mesh.position(binding.coords, ring.axes)
    there = (here - step) % ranks
    length, keys = (x.tensor.shape[2] // ranks for x in (q, k))
    tiles = kernels.tiles(here, there, length, keys, is_causal=ring.is_causal)
    columns = slice(there * keys, (there + 1) * keys)
    block = partial(kernels.Block, tiles, columns, ring.scale, ring.dropout_p)
    if not ring.dropout_p:
        fixed = block(None)
        return lambda: fixed
    shape = (*q.tensor.shape[:3], k.tensor.shape[2])
    coords = (*binding.coordinates(q.placed.dims[:3]), columns.start)
    index = binding.index(op_id, shape, coords)
    return lambda: block(index())
