"""A composite whose rows visit other ranks: they go where `owner` says, are doubled, and come back.

Run by every process of a test: two ranks train as one process does, and both learn where rows had
no room.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.graph.custom import custom
from meshwright.compiler.graph.ir import MeshOp, Node, NodeType, TensorType
from meshwright.compiler.layout.factors import cut, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    LoweringContext,
    composite,
)
from meshwright.compiler.placing.rules.notation import Row
from meshwright.passes.rewriting.rewriter import Rewriter, rewrites
from meshwright.runtime.errors import OverfullError

aten = torch.ops.aten
maximum = 8
"""The most rows that one rank takes."""


class Visit(Composite):
    """`visit(x, owner)`: twice `x[r, k]`; each row is doubled by the rank `owner[r]`."""

    op = MeshOp("visit")
    rule = Row("r k, r -> r k", linear=((0,),))

    def adjoint(self, context: AdjointContext) -> Cotangents:
        return [context.call(self.op, context.grad, context.node.args[1]), None]

    def lower(self, context: LoweringContext) -> Node | None:
        x, owner = context.args
        axes = dim_axes(x.placed.dims[0])
        if not axes:
            return None
        ranks, (rows, width) = context.mesh.size(axes), x.tensor.shape
        given = context.call(aten.view.default, x, [ranks, rows // ranks, width])
        owners = context.call(aten.view.default, owner, [ranks, rows // ranks])
        ordered, counts, order = context.items(context.call(Sorted.op, given, owners, ranks))
        sent = context.call(aten.view.default, ordered, [rows, width])
        here = Layout((((cut(ranks)[0]),), cut(ranks, *axes)))
        received = context.collective("all_to_all", counts, here, axes)
        arrived = _exchanged(context, sent, maximum * ranks, axes, counts, received)
        doubled = context.call(aten.mul.Tensor, arrived, 2)
        home = _exchanged(context, doubled, rows, axes, received, counts)
        back = context.call(aten.view.default, home, [ranks, rows // ranks, width])
        found = context.call(Unsorted.op, back, order)
        return context.call(aten.view.default, found, [rows, width])

    def bind(self, binding: BindingContext) -> Kernel:
        return lambda x, owner: x * 2


def _exchanged(
    context: LoweringContext,
    rows: Node,
    most: int,
    axes: tuple[str, ...],
    sent: Node,
    received: Node,
) -> Node:
    dims = (cut(most, *axes), *rows.placed.dims[1:])
    return context.collective(
        "exchange_rows",
        rows,
        rows.placed.with_dims(dims),
        axes,
        type=TensorType((most, rows.tensor.shape[1]), rows.tensor.dtype),
        sent=sent,
        received=received,
    )


class Sorted(Composite):
    """`sorted(x, owner, ranks)`: `x[g, r, k]` in the order of its owners, how many rows there are
    of each, `[g, ranks]`, and the order."""

    op = MeshOp("sorted")
    rule = Row("g r! k, g r! -> g r! k, g n!, g r!", linear=())

    def result_type(self, x: TensorType, owner: TensorType, ranks: int) -> NodeType:
        counts = TensorType((x.shape[0], ranks), torch.int64)
        return (x, counts, TensorType(owner.shape, torch.int64))

    def bind(self, binding: BindingContext) -> Kernel:
        ranks = binding.node.args[2]

        def ordered(x: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            order = owner.argsort(stable=True)
            counts = (owner.unsqueeze(2) == torch.arange(ranks)).sum(1)
            return x.gather(1, order.unsqueeze(2).expand(x.shape)), counts, order

        return ordered


class Unsorted(Composite):
    """`unsorted(x, order)`: the rows as they were."""

    op = MeshOp("unsorted")
    rule = Row("g r! k, g r! -> g r! k")

    def bind(self, binding: BindingContext) -> Kernel:
        return lambda x, order: torch.empty_like(x).scatter_(
            1, order.unsqueeze(2).expand(x.shape), x
        )


visit = custom(
    lambda x, owner: x * 2,
    rule="r k, r -> r k",
    vjp=lambda grads, inputs, outputs: (grads[0] * 2, None),
)
"""What a model calls."""
NAME = f"meshwright_custom::{visit.name}"


def rewritten(rewriter: Rewriter) -> Node:
    return rewriter.call(Visit.op, *rewriter.args)


class Visiting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x: Tensor, owner: Tensor) -> Tensor:
        loss: Tensor = visit(self.up(x), owner).square().mean()
        return loss


PLAN = "mesh ep={}\ndata x over ep\ndata owner over ep\n"


def register() -> None:
    for kind in (Visit, Sorted, Unsorted):
        composite(kind)
    rewrites(NAME)(rewritten)


def inputs(ranks: int, *, to_one: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    owner = torch.randint(ranks, (4 * ranks,)) // (ranks - 1)
    return torch.randn(4 * ranks, 6, dtype=torch.float64), owner * 0 if to_one else owner


def check(run: meshwright.Run, model: nn.Module, ranks: int) -> None:
    """A step that has no room on rank 0 changes nothing, and the next is that of the model."""
    global maximum
    given = inputs(ranks)
    loss = model(*given)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with pytest.raises(OverfullError, match=f"{4 * ranks} rows .* has room for {maximum}") as found:
        run.step(*inputs(ranks, to_one=True))
    assert found.value.peers == tuple(range(ranks))
    torch.testing.assert_close(run.step(*given), loss.detach())
    torch.testing.assert_close(list(run.gradients().values()), list(gradients))


def compiled(ranks: int) -> tuple[nn.Module, meshwright.Program]:
    torch.manual_seed(1)
    model = Visiting().double()
    plan = meshwright.Plan.parse(PLAN.format(ranks))
    return model, meshwright.compile(model, plan, inputs(ranks))


def main() -> None:
    """Train on the two processes of a test."""
    global maximum
    maximum = 6
    register()
    model, program = compiled(2)
    with program.launch() as run:
        check(run, model, 2)
    print("done")


if __name__ == "__main__":
    main()
