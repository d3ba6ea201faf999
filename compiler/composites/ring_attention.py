"""Attention over a sequence that is split: keys and values go round the ranks of its axes.

`ring_attention` and its backward are lowered to one step for each block of keys, and the exchanges
that bring the block of the next step meanwhile:

Before:  attention: (f32[8, 4, 8@cp, 6], f32[8, 4, 8@cp]) = mesh::ring_attention(unbind_0, unbind_1,
             unbind_2, None, True, None, 0.0, 0, [cp], 2, contiguous, None)
After:   permute_1: f32[8, 4, 8@cp, 6]                      = permute(unbind_1, cp, shift=1)
         permute_2: f32[8, 4, 8@cp, 6]                      = permute(unbind_2, cp, shift=1)
         ring_step: (f32[8, 4, 8@cp, 6], f32[8, 4, 8@cp])   = mesh::ring_step(unbind_0, unbind_1,
             unbind_2, None, None, None, True, None, 0.0, 0, [cp], 2, contiguous, None, 0,
             False)
         ring_step_1: (f32[8, 4, 8@cp, 6], f32[8, 4, 8@cp]) = mesh::ring_step(unbind_0, permute_1,
             permute_2, None, getitem_1, getitem_2, True, None, 0.0, 0, [cp], 2, contiguous,
             None, 1, True)

At step t a rank works on the block of the rank t places before it. The gradients of a block's keys
and values go round behind it, each rank adding its own, and one more exchange takes them home.
Elsewhere: Ring Attention (Liu et al., 2310.01889).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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


class Ring(NamedTuple):
    """The last arguments of these operators: the options of attention, the `axes` round which keys
    and values go, how many `blocks` of them a rank meets, the `order` of the sequence, `zigzag` or
    `contiguous` (see `kernels/ring.py`), and how many positions a query looks back at most, if that
    is known and none looks ahead."""

    is_causal: bool
    scale: float | None
    dropout_p: float
    op_id: int
    axes: tuple[str, ...]
    blocks: int
    order: str
    reach: int | None

    @classmethod
    def of(cls, args: tuple[Arg, ...], num_operands: int) -> Ring:
        """The options that follow the operands."""
        return cls(*args[num_operands : num_operands + len(cls._fields)])


@composite
class RingAttention(Composite):
    """`ring_attention(q, k, v, bias, *ring) -> (out, lse)`."""

    op = MeshOp("ring_attention")
    number = 7

    def rule(self, call: Call) -> Spec:
        over = Ring.of(call.args, 4).axes
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
        q, k, v, bias, *rest = context.args
        ring = Ring(*rest)
        out: Node | None = None
        lse: Node | None = None
        for number in range(ring.blocks - 1):
            following = [_moved_on(context, x, ring, after=out) for x in (k, v)]
            step = context.call(RingStep.op, q, k, v, bias, out, lse, *ring, number, False)
            out, lse = context.items(step)
            k, v = following
        return context.call(RingStep.op, q, k, v, bias, out, lse, *ring, ring.blocks - 1, True)


@composite
class RingAttentionBackward(Composite):
    """`ring_attention_backward(grad, q, k, v, out, lse, bias, *ring, wants_bias)` gives the
    gradients of q, k, v and the bias."""

    op = MeshOp("ring_attention_backward")
    number = 10

    def rule(self, call: Call) -> Spec:
        over, results = Ring.of(call.args, 7).axes, (QUERY, KEY, VALUE, COLUMNS)
        return attention_spec(call, _BACKWARD, results, query=1, bias=6, linear=FIRST, over=over)

    def result_type(self, grad: TensorType, *rest: Arg) -> NodeType:
        q, k, v, _, _, bias = rest[:6]
        return (q, k, v, bias if rest[-1] else None)

    def lower(self, context: LoweringContext) -> Lowered:
        grad, q, k, v, out, lse, bias, *rest, wants_bias = context.args
        ring = Ring(*rest)
        dq: Node | None = None
        sums: list[Node | None] = [None, None, None]
        for number in range(ring.blocks):
            sums[:2] = [_moved_on(context, x, ring) for x in sums[:2]]
            last = number == ring.blocks - 1
            following = [] if last else [_moved_on(context, x, ring, after=dq) for x in (k, v)]
            operands = (grad, q, k, v, out, lse, bias, dq)
            step = context.call(RingStepBackward.op, *operands, *ring, number, wants_bias)
            dq, *own = context.items(step)
            sums = list(map(partial(_sum, context), sums, own))
            k, v = following or (k, v)
        dk, dv, dbias = sums
        home = context.mesh.size(ring.axes) - ring.blocks + 1
        dk, dv = (_moved_on(context, x, ring, shift=home) for x in (dk, dv))
        grads = zip((dq, dk, dv, dbias), (q, k, v, bias), strict=True)
        return tuple(dx and _cast(context, dx, x.tensor.dtype) for dx, x in grads)


@composite
class RingStep(Composite):
    """`ring_step(q, k, v, bias, out, lse, *ring, step, last) -> (out, lse)`: what the blocks
    of the steps so far give, this one included."""

    op = MeshOp("ring_step")
    number = 9

    def rule(self, call: Call) -> Spec:
        terms, over = (*_OPERANDS, OUT, LSE), Ring.of(call.args, 6).axes
        return attention_spec(call, terms, (OUT, LSE), query=0, bias=3, over=over)

    def result_type(self, q: TensorType, k: TensorType, v: TensorType, *rest: Arg) -> NodeType:
        kind = accumulation_dtype(q.dtype)
        out = TensorType((*q.shape[:-1], v.shape[-1]), q.dtype if rest[-1] else kind)
        return (out, TensorType(q.shape[:-1], kind))

    def bind(self, binding: BindingContext) -> Kernel:
        *_, number, last = binding.node.args
        block = _block(binding, 0, Ring.of(binding.node.args, 6), number)
        step = partial(kernels.ring_forward, last=last)
        return lambda *tensors: step(*tensors, block=block())


@composite
class RingStepBackward(Composite):
    """`ring_step_backward(grad, q, k, v, out, lse, bias, dq, *ring, step, wants_bias)` gives the
    gradient of q over the steps so far, and what this one adds to those of the block's keys and
    values and of the bias: `(dq, dk, dv, dbias)`."""

    op = MeshOp("ring_step_backward")
    number = 11

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
            over=Ring.of(call.args, 8).axes,
        )

    def result_type(self, grad: TensorType, *rest: Arg) -> NodeType:
        q, k, v, _, _, bias = rest[:6]
        kind = accumulation_dtype(q.dtype)
        found = (x and TensorType(x.shape, kind) for x in (q, k, v, bias if rest[-1] else None))
        return tuple(found)

    def bind(self, binding: BindingContext) -> Kernel:
        *_, number, wants_bias = binding.node.args
        block = _block(binding, 1, Ring.of(binding.node.args, 8), number)
        step = partial(kernels.ring_backward, need_bias_grad=wants_bias)
        return lambda *tensors: step(*tensors, block=block())


def _moved_on(
    context: LoweringContext, x: Node | None, ring: Ring, after: Node | None = None, shift: int = 1
) -> Node | None:
    """What the rank `shift` places before has, on each rank: sent once the step `after` is over, so
    that no more than two blocks are there."""
    options: dict[str, Arg] = {} if after is None else {"after": after}
    return x and context.collective("permute", x, x.placed, ring.axes, shift=shift, **options)


def _sum(context: LoweringContext, total: Node | None, own: Node | None) -> Node | None:
    if total is None or own is None:
        return own
    return context.call(aten.add.Tensor, total, own)


def _cast(context: LoweringContext, x: Node, dtype: torch.dtype) -> Node:
    return x if x.tensor.dtype == dtype else context.call(aten._to_copy.default, x, dtype=dtype)


def _block(
    binding: BindingContext, query: int, ring: Ring, step: int
) -> Callable[[], kernels.Block]:
    """The block of a step on this rank, for each time that the step runs."""
    q, k = binding.operand(query), binding.operand(query + 1)
    here = binding.mesh.position(binding.coords, ring.axes)
    ranks = binding.mesh.size(ring.axes)
    there = (here - step) % ranks
    own, sent = (kernels.Part(x.tensor.shape[2], ranks, ring.order) for x in (q, k))
    columns = sent.stored(there)
    tiles = kernels.tiles(own, here, there) if ring.is_causal else kernels.all_of(own, sent)
    if ring.reach is not None and not kernels.sees(own, here, there, ring.reach):
        tiles = ()
    block = partial(kernels.Block, tiles, columns, ring.scale, ring.dropout_p)
    if not ring.dropout_p:
        fixed = block(None)
        return lambda: fixed
    shape = (*q.tensor.shape[:3], k.tensor.shape[2])
    outer = binding.coordinates(q.placed.dims[:2])
    index = binding.index(ring.op_id, shape, (*outer, own.positions(here), sent.positions(there)))
    return lambda: block(index())
