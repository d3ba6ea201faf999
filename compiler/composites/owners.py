"""Rows to the ranks that have the matrices of their groups, and back.

Before:  to_owners: f64[1, 2@ep, 8, 8] = mesh::to_owners(view_2, view_1, 4, 2, 8, [ep])
After:   owner_order: i64[8@ep]           = mesh::owner_order(view_1, 4, 2)
         owner_counts: i64[1, 2@ep, 2]    = mesh::owner_counts(view_1, 4, 2)
         all_to_all: i64[1, 2, 2@ep]      = all_to_all(owner_counts, ep)
         by_owner_1: f64[8@ep, 8]         = mesh::by_owner(view_2_1, owner_order)
         exchange_rows_1: f64[16@ep, 8]   = exchange_rows(by_owner_1, ep, sent=owner_counts,
             received=all_to_all)
         view_4: f64[1, 2@ep, 8, 8]       = view(exchange_rows_1, [1, 2, 8, 8])

Groups, such as experts, have owners: of 8 groups and 2 owners, the first has the first 4. Rows come
in slices, `x[g, s, k]` with their groups `group[g, s, t]`, or `x[g, s, t, k]`; each slice is an
exchange of its own. Rows that are split over the ranks of the owners are exchanged, by as many as
there are; where they are not split, each rank takes those of its own groups.
Elsewhere: the token dispatch of MegaBlocks (2211.15841).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.kernels import owners as kernels
from meshwright.compiler.layout.factors import Dim, cut, dim_axes, whole
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
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
from meshwright.compiler.placing.rules.notation import FIRST, Call, Dims, Letters, Placement, Spec
from meshwright.compiler.placing.rules.placements import is_consecutive, spec_placements

aten = torch.ops.aten

_GROUP: Letters = ("g", "s", "t")


def _placements(
    call: Call, terms: tuple[Letters, ...], result: Letters, owners: int, axes: tuple[str, ...]
) -> Iterator[Placement]:
    """Rows split over the axes of the owners are exchanged; otherwise each rank takes its own."""
    linear = FIRST if len(terms) > 1 else ()
    spec = Spec(terms, (result,), whole=frozenset({"t", "m"}), linear=linear)
    bind = partial(_exchanged, owners, axes, call.mesh)
    yield from spec_placements(replace(spec, derived=frozenset("q"), bind=bind), call)
    own = {"q": (cut(owners, *axes),)} if owners % call.mesh.size(axes) == 0 else {}
    apart = replace(spec, whole=spec.whole | {"s"}, free=frozenset("q"), offers=own)
    yield from spec_placements(replace(apart, consecutive=frozenset("q")), call)


def _exchanged(owners: int, axes: tuple[str, ...], mesh: Mesh, dims: Dims) -> Dims:
    """How owners are split where rows are; one slice on a rank is exchanged with its group."""
    (slices,) = Layout((dims["g"],)).local_shape(mesh)
    together = dim_axes(dims["s"]) == axes and is_consecutive(dims["s"], mesh)
    if not together or slices != 1 or owners != mesh.size(axes):
        raise LayoutError(
            f"rows `{Layout((dims['g'], dims['s']))}` are not one slice of each rank of "
            f"{', '.join(axes)}",
            code="not-exchanged",
            help="split the rows over the axes of their owners",
        )
    return {"q": cut(owners, *axes)}


def _letters(num_dims: int) -> Letters:
    """The letters of rows: one for all of their groups, or one for each."""
    return ("g", "s", "k") if num_dims == 3 else ("g", "s", "t", "k")


@composite
class ToOwners(Composite):
    """`to_owners(x, group, experts, owners, maximum, axes)`: `x[g, s, k]` or `x[g, s, t, k]` and
    `group[g, s, t]` give `[g, q, m, k]`: the rows of each owner, in their order, then zeros."""

    op = MeshOp("to_owners")

    def rule(self, call: Call) -> Iterator[Placement]:
        terms = (_letters(len(call.operands[0].type.shape)), _GROUP)
        return _placements(call, terms, ("g", "q", "m", "k"), call.args[3], call.args[5])

    def result_type(
        self, x: TensorType, group: TensorType, experts: int, owners: int, maximum: int, axes: Arg
    ) -> NodeType:
        return TensorType((x.shape[0], owners, maximum, x.shape[-1]), x.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        x, group, experts, owners, _, axes = context.node.args
        found = context.call(FromOwners.op, context.grad, group, experts, owners, axes)
        if len(x.tensor.shape) == 3:
            found = context.call(aten.sum.dim_IntList, found, (2,))
        return [found, None]

    def lower(self, context: LoweringContext) -> Lowered:
        x, group, experts, owners, _, _ = context.args
        if not dim_axes(group.placed.dims[1]):
            return None
        return _sent(context, x, group, experts, owners)

    def bind(self, binding: BindingContext) -> Kernel:
        _, _, experts, owners, maximum, _ = binding.node.args
        own = _own(binding, binding.node.placed.dims[1])
        return lambda x, group: kernels.to_owners(x, group, experts, owners, maximum, *own)


@composite
class OwnedGroups(Composite):
    """`owned_groups(group, experts, owners, maximum, axes)`: `group[g, s, t]` gives `[g, q, m]`:
    the groups of each owner's rows, as `to_owners` has these, counted from its first one; behind
    them the number after its last."""

    op = MeshOp("owned_groups")

    def rule(self, call: Call) -> Iterator[Placement]:
        return _placements(call, (_GROUP,), ("g", "q", "m"), call.args[2], call.args[4])

    def result_type(
        self, group: TensorType, experts: int, owners: int, maximum: int, axes: Arg
    ) -> NodeType:
        return TensorType((group.shape[0], owners, maximum), group.dtype)

    def lower(self, context: LoweringContext) -> Lowered:
        group, experts, owners, *_ = context.args
        if not dim_axes(group.placed.dims[1]):
            return None
        each = experts // owners
        # What is not there is zero when it comes.
        rows = context.call(aten.remainder.Scalar, group, each)
        rows = context.call(aten.sub.Scalar, rows, each)
        rows = context.call(aten.unsqueeze.default, rows, 3)
        found = _sent(context, rows, group, experts, owners)
        found = context.call(aten.squeeze.dim, found, 3)
        return context.call(aten.add.Scalar, found, each)

    def bind(self, binding: BindingContext) -> Kernel:
        _, experts, owners, maximum, _ = binding.node.args
        own = _own(binding, binding.node.placed.dims[1])
        return lambda group: kernels.owned_groups(group, experts, owners, maximum, *own)


@composite
class FromOwners(Composite):
    """`from_owners(y, group, experts, owners, axes)`: `y[g, q, m, n]`, rows as `to_owners` gives
    them for `group[g, s, t]`, are put back: `[g, s, t, n]`."""

    op = MeshOp("from_owners")

    def rule(self, call: Call) -> Iterator[Placement]:
        terms: tuple[Letters, ...] = (("g", "q", "m", "n"), _GROUP)
        return _placements(call, terms, ("g", "s", "t", "n"), call.args[3], call.args[4])

    def result_type(
        self, y: TensorType, group: TensorType, experts: int, owners: int, axes: Arg
    ) -> NodeType:
        return TensorType((*group.shape, y.shape[3]), y.dtype)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        y, group, experts, owners, axes = context.node.args
        maximum = y.tensor.shape[2]
        given = (context.grad, group, experts, owners, maximum, axes)
        return [context.call(ToOwners.op, *given), None]

    def lower(self, context: LoweringContext) -> Lowered:
        y, group, experts, owners, _ = context.args
        over = dim_axes(group.placed.dims[1])
        if not over:
            return None
        rows = context.call(
            aten.view.default, y, [math.prod(y.tensor.shape[:3]), y.tensor.shape[3]]
        )
        sent, received = _counts(context, group, experts, owners)
        num_rows = math.prod(group.tensor.shape)
        back = _exchanged_rows(context, rows, num_rows, over, received, sent)
        order = context.shared(OwnerOrder.op, group, experts, owners)
        return context.call(InOrder.op, back, order, group)

    def bind(self, binding: BindingContext) -> Kernel:
        _, _, experts, owners, _ = binding.node.args
        first, _ = _own(binding, binding.operand(0).placed.dims[1])
        return lambda y, group: kernels.from_owners(y, group, experts, owners, first)


@composite
class OwnerOrder(Composite):
    """`owner_order(group, experts, owners)`: the places of a rank's rows, those of the first owner
    first, `[(g s t)]`."""

    op = MeshOp("owner_order")

    def rule(self, call: Call) -> Spec:
        return _local((_GROUP,), ("r",), math.prod(call.operands[0].type.shape))

    def result_type(self, group: TensorType, experts: int, owners: int) -> NodeType:
        return TensorType((math.prod(group.shape),), torch.int64)

    def bind(self, binding: BindingContext) -> Kernel:
        experts, owners = binding.node.args[1:]
        return lambda group: kernels.owner_order(group, experts, owners)


@composite
class ByOwner(Composite):
    """`by_owner(x, order)`: the rows of a rank in an order, `[(g s t), k]`."""

    op = MeshOp("by_owner")

    def rule(self, call: Call) -> Spec:
        x, order = (operand.type.shape for operand in call.operands)
        return _local((_letters(len(x)), ("r",)), ("r", "k"), *order)

    def result_type(self, x: TensorType, order: TensorType) -> NodeType:
        return TensorType((*order.shape, x.shape[-1]), x.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        return kernels.by_owner


@composite
class InOrder(Composite):
    """`in_order(rows, order, group)`: what `by_owner` gives as it was before, `[g, s, t, k]`."""

    op = MeshOp("in_order")

    def rule(self, call: Call) -> Spec:
        order = call.operands[1].type.shape
        return _local((("r", "k"), ("r",), _GROUP), (*_GROUP, "k"), *order)

    def result_type(self, rows: TensorType, order: TensorType, group: TensorType) -> NodeType:
        return TensorType((*group.shape, rows.shape[1]), rows.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        return kernels.in_order


@composite
class OwnerCounts(Composite):
    """`owner_counts(group, experts, owners)`: the number of rows that each rank has for each owner,
    `[g, q, q]`, of as many ranks as owners."""

    op = MeshOp("owner_counts")

    def rule(self, call: Call) -> Spec:
        owners = call.args[2]

        def bind(dims: Dims) -> Dims:
            return {"p": cut(owners, *dim_axes(dims["s"]))}

        return Spec((_GROUP,), (("g", "p", "q"),), whole=frozenset("t"), bind=bind)

    def result_type(self, group: TensorType, experts: int, owners: int) -> NodeType:
        return TensorType((group.shape[0], owners, owners), group.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        experts, owners = binding.node.args[1:]
        return lambda group: kernels.owner_counts(group, experts, owners)


def _local(terms: tuple[Letters, ...], result: Letters, num_rows: int) -> Spec:
    """The rule of a step on the rows of each rank: `r` are those of all slices, in blocks."""

    def bind(dims: Dims) -> Dims:
        return {"r": cut(num_rows, *dim_axes(dims["g"]), *dim_axes(dims["s"]))}

    spec = Spec(terms, (result,), whole=frozenset("t"), linear=FIRST)
    return replace(spec, derived=frozenset("r"), bind=bind)


def _own(binding: BindingContext, owners: Dim) -> tuple[int, int]:
    """The first of the owners that a rank has, and how many it has."""
    return binding.start(owners), Layout((owners,)).local_shape(binding.mesh)[0]


def _counts(context: LoweringContext, group: Node, experts: int, owners: int) -> tuple[Node, Node]:
    """How many rows go to each owner, and come from each."""
    sent = context.shared(OwnerCounts.op, group, experts, owners)
    slices, ranks, _ = sent.placed.dims
    return sent, context.reshard(sent, Layout((slices, whole(owners), ranks)))


def _sent(context: LoweringContext, x: Node, group: Node, experts: int, owners: int) -> Node:
    """The rows of each owner, which it has been sent."""
    rows = context.call(ByOwner.op, x, context.shared(OwnerOrder.op, group, experts, owners))
    shape = context.node.tensor.shape[:3]
    sent, received = _counts(context, group, experts, owners)
    over = dim_axes(group.placed.dims[1])
    found = _exchanged_rows(context, rows, math.prod(shape), over, sent, received)
    return context.call(aten.view.default, found, [*shape, x.tensor.shape[-1]])


def _exchanged_rows(
    context: LoweringContext,
    rows: Node,
    num_rows: int,
    over: tuple[str, ...],
    sent: Node,
    received: Node,
) -> Node:
    """As many rows as counts say, in place of those on each rank."""
    before = rows.placed
    first = cut(num_rows, *dim_axes(before.dims[0]))
    return context.collective(
        "exchange_rows",
        rows,
        Layout((first, *before.dims[1:]), before.partial, before.varying),
        over,
        type=TensorType((num_rows, *rows.tensor.shape[1:]), rows.tensor.dtype),
        sent=sent,
        received=received,
    )
