"""Changes of layout that were inserted, and which of them gather."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from meshwright.compiler.graph.ir import Node, Op
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import Collective, cost


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a value changes its layout."""

    forced: bool = True
    """Whether the plan left no other choice: it wrote the layout of another operand, which stays as
    it is, splits the sequence that this moves, or cuts the batch into microbatches that this takes
    together."""
    lines: tuple[tuple[str, str], ...] = ()
    """By axis: the line of the plan behind the split that is made, or the sum that is reduced."""
    instead: str = ""
    """What the next best choice would cost, for what takes the value."""


@dataclass(frozen=True, slots=True)
class Movement:
    """A change of layout that was inserted, and the call that asked for it."""

    value: Node
    user: Op
    collective: Collective
    node: Node
    reason: Reason

    @property
    def implicit(self) -> bool:
        """Whether it or its adjoint gathers, and nothing that the plan wrote made that the only
        way."""
        return not self.reason.forced and gathers(self.collective, self.value)

    def sent_bytes(self, mesh: Mesh) -> int:
        """The bytes sent per rank for it and, where it is differentiated, its adjoint."""
        size = self.value.tensor.dtype.itemsize
        collective, differentiated = self.collective, self.value.requires_grad
        return math.ceil(cost(collective.source, collective.target, size, mesh, differentiated))


def gathers(collective: Collective, value: Node) -> bool:
    """Whether a change of a value's layout, or its adjoint, gathers.

    The adjoint of slicing a parameter does not count: its gradient is gathered however its work is
    split.
    """
    kind = collective.row
    if kind.moves:
        return kind.source == "split"
    back = COLLECTIVES[kind.adjoint].gathers
    return back and value.requires_grad and input_behind(value) is None


def stays_split(written: Layout, used: Layout, axes: Iterable[str]) -> bool:
    """Whether a value that the plan laid out is used split over any of these axes as it wrote."""
    return any(
        written.split_dim(axis) is not None and written.split_dim(axis) == used.split_dim(axis)
        for axis in axes
    )
