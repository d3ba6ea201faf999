"""A kind of collective that the product does not have: two rows, and nothing else, add it.

`mirror` gives each member of a group the block of the one as far from the other end. A pass puts
one behind a parameter, so that a whole program can be compiled, differentiated and run with it.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.compiler.graph.ir import INPUT, Builder, MeshOp, Node, rewrite
from meshwright.compiler.layout.collectives import COLLECTIVES, CollectiveKind
from meshwright.compiler.layout.wires import WIRES, WireKind
from meshwright.passes import driver
from meshwright.passes.partition import partition
from meshwright.passes.statements.draft import Draft

MIRROR = CollectiveKind("mirror", "split", "split", "mirror", "mirror")
MIRROR_WIRE = WireKind(
    "mirror",
    lambda wire, place, given, out: given[-1 - place],
    lambda wire, n: Fraction(1),
    needs=lambda wire, place, n: (n - 1 - place,),
)
PLAN = "mesh dp=1, tp=2\nshard weight [d@tp]"


class Scaled(nn.Module):
    """The sum of an input of 8 numbers, each times one of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 9.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def mirrored(draft: Draft) -> Draft:
    """Mirror every parameter right where it comes in."""

    def mirror(builder: Builder, node: Node, mapping: dict[Node, Node]) -> Node | None:
        if node.op != INPUT or node.args[0] != "parameter":
            return None
        return builder.emit(
            MeshOp("mirror"),
            (builder.copy(node, mapping),),
            {"axes": ("tp",)},
            type=node.type,
            layout=node.layout,
            origin=node.origin,
            requires_grad=True,
        )

    return replace(draft, graph=rewrite(draft.graph, mirror))


def register() -> None:
    """Add the rows, and the pass after the partitioner."""
    COLLECTIVES[MIRROR.name] = MIRROR
    WIRES[MIRROR_WIRE.name] = MIRROR_WIRE
    at = driver.PASSES.index(partition) + 1
    driver.PASSES = (*driver.PASSES[:at], mirrored, *driver.PASSES[at:])


def inputs() -> Tensor:
    """What the program is compiled for and run on."""
    return torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])


def compiled() -> mw.Program:
    """The mirrored program."""
    return mw.compile(Scaled(), mw.Plan.parse(PLAN), (inputs(),))


def check_run(run: mw.Run) -> None:
    """One step: the loss and the gradient are those of the halves changed over."""
    weight, x = torch.arange(1.0, 9.0), inputs()
    loss = run.step(x)
    assert loss.item() == (weight.roll(4) * x).sum().item(), loss
    assert run.gradients()["weight"].equal(x.roll(4)), run.gradients()
