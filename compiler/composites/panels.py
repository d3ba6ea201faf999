"""The steps of what two axes compute together: panels are broadcast to them, or sums are reduced to
where they are kept, one step ahead of the products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from meshwright.compiler.costs.prices import SMALL_BYTES
from meshwright.compiler.graph.aliasing import local_bytes
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.graph.slots import Slot
from meshwright.compiler.kernels import panels as kernels
from meshwright.compiler.kernels import products as large_products
from meshwright.compiler.layout.factors import Dim, cut, whole
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.placing.allowed import allowed
from meshwright.compiler.placing.composite import (
    BindingContext,
    Composite,
    Kernel,
    LoweringContext,
    composite,
)
from meshwright.compiler.placing.rules.notation import Call, Placement, Row, Spec

Fetch: TypeAlias = Callable[[int, "Node | None"], tuple[Node, ...]]
"""Emits what a step needs; its broadcasts begin once another node is computed."""
Add: TypeAlias = Callable[..., tuple[Node, ...]]
"""Emits the totals of a step, from its number, the totals before it, if any, and what was fetched.
"""
Multiply: TypeAlias = Callable[..., Iterable[Node]]
"""Emits what a step computes, one after the other, from its number and what was fetched."""
Matrices: TypeAlias = tuple[Node, Node]


class Panels:
    """Emits the steps over these axes. There are as many as the least common multiple of their
    sizes, so that a panel is always in one block.

    Of two steps, a rank would hold all panels in any case. Where these are so small that latency is
    most of what they take, they come `at_once`, in one message, and there is one step.
    """

    def __init__(self, context: LoweringContext, *axes: str) -> None:
        self.context = context
        steps = math.lcm(*map(context.mesh.size, axes))
        self.at_once = steps == 2 and _is_small(context)
        self.steps = 1 if self.at_once else steps

    def added(self, fetch: Fetch, add: Add) -> tuple[Node, ...]:
        """The totals of all steps."""
        totals: tuple[Node, ...] = ()

        def compute(step: int, *fetched: Node) -> Node:
            nonlocal totals
            totals = add(step, totals, *fetched)
            return totals[-1]

        self._run(fetch, compute)
        return totals

    def reduced(self, fetch: Fetch, multiply: Multiply, dim: int, axis: str) -> tuple[Node, ...]:
        """What all steps compute, each summed over `axis` where its part of the result is kept:
        blocks of `dim`. While a sum is under way, the next is computed."""
        under_way: dict[int, Node] = {}
        totals: dict[int, Node] = {}

        def put(i: int, step: int) -> None:
            totals[i] = self._put(totals.get(i), under_way.pop(i), dim, axis, step)

        def compute(step: int, *fetched: Node) -> Node:
            for i, part in enumerate(multiply(step, *fetched)):
                if under_way.get(i):
                    put(i, step - 1)  # before the next begins, which holds its operand
                under_way[i] = self._reduce(part, dim, axis, step)
            return part

        self._run(fetch, compute)
        for i in sorted(under_way):
            put(i, self.steps - 1)
        return tuple(totals.values())

    def _run(self, fetch: Fetch, compute: Callable[..., Node]) -> None:
        """Compute each step, with what the next one needs on its way."""
        fetched: tuple[Node, ...] = fetch(0, None)
        before: Node | None = None
        for step in range(self.steps):
            following = fetch(step + 1, before) if step + 1 < self.steps else ()
            before = compute(step, *fetched)
            fetched = following

    def broadcast(self, value: Node, dim: int, axis: str, step: int, after: Node | None) -> Node:
        """The panel of a step, from the coordinate of `axis` that has it, to all others."""
        if self.at_once:
            dims = with_dim(value.placed, dim, whole(value.tensor.shape[dim]))
            return self._moved("gather_panels", value, dims.add_varying((axis,)), axis, after)
        root, place = divmod(step, self._parts(axis))
        part, parts = value, self._parts(axis)
        if parts > 1:
            part = self.context.call(BlockPart.op, value, dim, place, parts, axis)
        size = part.tensor.shape[dim] // self.context.mesh.size(axis)
        layout = with_dim(part.placed, dim, whole(size)).add_varying((axis,))
        return self._moved("broadcast", part, layout, axis, after, root=root)

    def _reduce(self, part: Node, dim: int, axis: str, step: int) -> Node:
        """The sum over `axis`, at the coordinate that keeps it; zeros elsewhere."""
        size, total = part.tensor.shape[dim], part.placed.drop_partial((axis,))
        if self.at_once:
            return self._moved("scatter_panels", part, with_dim(total, dim, cut(size, axis)), axis)
        layout = with_dim(total, dim, cut(size * self.context.mesh.size(axis), axis))
        return self._moved("reduce", part, layout, axis, root=step // self._parts(axis))

    def _moved(
        self,
        kind: str,
        value: Node,
        layout: Layout,
        axis: str,
        after: Node | None = None,
        **options: Arg,
    ) -> Node:
        type = TensorType(layout.shape, value.tensor.dtype)
        if after is not None:
            options["after"] = after
        layout = layout.canonical(self.context.mesh)
        return self.context.collective(kind, value, layout, (axis,), type=type, **options)

    def _put(self, total: Node | None, block: Node, dim: int, axis: str, step: int) -> Node:
        """`total` with what a step has left in its place."""
        if self.at_once:
            return block
        return self.context.call(PutBlock.op, total, block, dim, step, self._parts(axis), axis)

    def _parts(self, axis: str) -> int:
        """The number of panels in a block over `axis`."""
        return self.steps // self.context.mesh.size(axis)


def _is_small(context: LoweringContext) -> bool:
    """Whether neither an operand nor a result is more than is sent with others."""
    nodes = (*context.node.operands(), context.node)
    return all(local_bytes(each, context.mesh) <= SMALL_BYTES for each in nodes)


def products(
    context: LoweringContext, totals: Sequence[Node], pairs: Iterable[Matrices], form: str
) -> tuple[Node, ...]:
    """The product of each pair, added to the total that it has so far, if any."""
    if not totals:
        return tuple(context.call(PanelProduct.op, *pair, form) for pair in pairs)
    given = zip(totals, pairs, strict=True)
    return tuple(context.call(AddPanelProduct.op, t, *pair, form) for t, pair in given)


def summed_products(context: LoweringContext, pairs: Iterable[Matrices], form: str) -> Node:
    """The sum of the products of all pairs."""
    total: tuple[Node, ...] = ()
    for pair in pairs:
        total = products(context, total, [pair], form)
    return total[0]


def with_dim(layout: Layout, place: int, dim: Dim) -> Layout:
    return layout.with_dims((*layout.dims[:place], dim, *layout.dims[place + 1 :]))


_FORMS = {
    "nn": "... k, k n -> ... n",
    "nt": "... k, n k -> ... n",
    "tn": "... m, ... n -> m n",
}


def _large(binding: BindingContext, a: int, b: int) -> bool:
    """Whether the product of two operands is large on a rank."""
    if binding.operand(a).tensor.dtype != torch.float32 or not large_products.is_faster(
        binding.device
    ):
        return False
    form = binding.node.args[-1]
    *rows, last = binding.operand(a).placed.local_shape(binding.mesh)
    columns = binding.node.placed.local_shape(binding.mesh)[-1]
    sizes = (last, math.prod(rows)) if form == "tn" else (math.prod(rows), last)
    return large_products.is_large(*sizes, columns)


@composite
class PanelProduct(Composite):
    """`panel_product(a, b, form)`; see `kernels.factors`."""

    op = MeshOp("panel_product")
    is_fresh = True

    def rule(self, call: Call) -> Spec:
        return Row(_FORMS[call.args[-1]], linear=((0,), (1,)))(call)

    def result_type(self, a: TensorType, b: TensorType, form: str) -> NodeType:
        columns = b.shape[0 if form == "nt" else -1]
        leading = a.shape[-1:] if form == "tn" else a.shape[:-1]
        return TensorType((*leading, columns), a.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        form = binding.node.args[-1]
        return partial(kernels.product, form=form, large=_large(binding, 0, 1))


@composite
class AddPanelProduct(Composite):
    """`add_panel_product(total, a, b, form)` adds a product to `total`, in its memory: nothing else
    may read that."""

    op = MeshOp("add_panel_product")
    is_fresh = True

    def rule(self, call: Call) -> Iterable[Placement]:
        """The total is as the product leaves it, pending sums included."""
        _, *pair = call.operands
        args = Slot(0), Slot(1), call.args[-1]
        product = replace(call, op=PanelProduct.op, args=args, operands=tuple(pair))
        for found in allowed(product):
            (result,) = found.results
            assert result is not None
            yield Placement((result, *found.operands), found.results)

    def bind(self, binding: BindingContext) -> Kernel:
        form = binding.node.args[-1]
        return partial(kernels.add_product, form=form, large=_large(binding, 1, 2))


@composite
class BlockPart(Composite):
    """`block_part(value, dim, place, parts, axis)`: one of equal parts of each rank's block."""

    op = MeshOp("block_part")

    def rule(self, call: Call) -> Iterable[Placement]:
        (value,) = call.operands
        dim, _, parts, axis = call.args[1:]
        size = value.type.shape[dim]
        source = with_dim(value.layout, dim, cut(size, axis))
        return (Placement((source,), (with_dim(source, dim, cut(size // parts, axis)),)),)

    def result_type(self, value: TensorType, dim: int, *rest: Arg) -> NodeType:
        shape = (*value.shape[:dim], value.shape[dim] // rest[1], *value.shape[dim + 1 :])
        return TensorType(shape, value.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        dim, place, parts, _ = binding.node.args[1:]

        def part(value: Tensor) -> Tensor:
            size = value.shape[dim] // parts
            return value.narrow(dim, place * size, size)

        return part


@composite
class PutBlock(Composite):
    """`put_block(total, block, dim, step, parts, axis)` writes the block of a step over its part of
    `total`, on the coordinate of `axis` that has it; with no total yet, over zeros. Where there is
    one part, the first block is the total from there on."""

    op = MeshOp("put_block")

    def rule(self, call: Call) -> Iterable[Placement]:
        *totals, block = call.operands
        dim, _, parts, axis = call.args[2:]
        size = block.type.shape[dim]
        source = with_dim(block.layout, dim, cut(size, axis))
        result = with_dim(source, dim, cut(size * parts, axis))
        return (Placement((*(result for _ in totals), source), (result,)),)

    def result_type(self, total: TensorType | None, block: TensorType, *rest: Arg) -> NodeType:
        dim, _, parts, _ = rest
        shape = (*block.shape[:dim], block.shape[dim] * parts, *block.shape[dim + 1 :])
        return TensorType(shape, block.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        dim, step, parts, axis = binding.node.args[2:]
        root, place = divmod(step, parts)
        own = binding.coords.get(axis, 0) == root
        shape = binding.node.placed.local_shape(binding.mesh)

        def put(total: Tensor | None, block: Tensor) -> Tensor:
            if total is None and parts == 1:
                return block
            if total is None:
                total = block.new_zeros(shape)
            return kernels.put_block(total, block, dim, place) if own else total

        return put
