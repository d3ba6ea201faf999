"""A composite from one class: rows less their mean, which goes round in a ring where they are
split.

Run by every process of a test: two ranks train as one process does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.graph.custom import custom
from meshwright.compiler.graph.ir import MeshOp, Node
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
from meshwright.compiler.placing.rules.notation import Row
from meshwright.passes.rewriting.rewriter import Rewriter, rewrites

aten = torch.ops.aten


def plain(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


centre = custom(plain, rule="... n! -> ... n", vjp=lambda grads, inputs, outputs: plain(grads[0]))
"""What a model calls."""


class Centre(Composite):
    """`centre(x)`: linear, and its own adjoint."""

    op = MeshOp("centre")
    rule = Row("... n~ -> ... n", linear=((0,),))

    def adjoint(self, context: AdjointContext) -> Cotangents:
        return [context.call(self.op, context.grad)]

    def lower(self, context: LoweringContext) -> Node | None:
        (x,) = context.args
        axes = dim_axes(x.placed.dims[-1])
        if not axes:
            return None
        *rows, size = x.tensor.shape
        ranks = context.mesh.size(axes)
        blocks = context.call(aten.view.default, x, [*rows, ranks, size // ranks])
        total = part = context.call(aten.sum.dim_IntList, blocks, [-1], True)
        for _ in range(ranks - 1):
            part = context.collective("permute", part, part.placed, axes, shift=1)
            total = context.call(aten.add.Tensor, total, part)
        mean = context.call(aten.div.Tensor, total, size)
        return context.call(
            aten.view.default, context.call(aten.sub.Tensor, blocks, mean), list(x.tensor.shape)
        )

    def bind(self, binding: BindingContext) -> Kernel:
        return plain


NAME = f"meshwright_custom::{centre.name}"


def rewritten(rewriter: Rewriter) -> Node:
    return rewriter.call(Centre.op, *rewriter.args)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.down(centre(self.up(x)).square()).square().mean()
        return loss


WHOLE = "mesh dp=2\ndata x over dp\n"
SPLIT = "mesh tp=2\ncolumns up over tp\nrows down over tp\n"
BOTH = "mesh dp=2, tp=4\ndata x over dp\ncolumns up over tp\nrows down over tp\n"


def train_on_processes() -> None:
    composite(Centre)
    rewrites(NAME)(rewritten)
    torch.manual_seed(0)
    model, x = Centred().double(), torch.randn(4, 6, dtype=torch.float64)
    loss = model(x)
    gradients = dict(zip(dict(model.named_parameters()), _gradients(model, loss), strict=True))
    with meshwright.compile(model, meshwright.Plan.parse(SPLIT), (x,)).launch() as run:
        torch.testing.assert_close(run.step(x), loss.detach())
        torch.testing.assert_close(run.gradients(), gradients)
    print("done")


def _gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))


if __name__ == "__main__":
    train_on_processes()
