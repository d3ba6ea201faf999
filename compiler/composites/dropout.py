"""Dropout whose mask is a hash of the global element index: the same under every layout."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.compiler.graph.ir import Arg, MeshOp
from meshwright.compiler.kernels.dropout import dropout
from meshwright.compiler.kernels.ring import Part
from meshwright.compiler.layout.extents import Extent, true_positions
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    composite,
)
from meshwright.compiler.placing.rules.notation import Row


@composite
class Dropout(Composite):
    """`dropout(x, p, op_id[, extents[, orders]])`; `extents` are the dims of x that are padded
    sequences, and `orders` those whose sequences are in zigzag order."""

    op = MeshOp("dropout")
    rule = Row("... -> ...")
    number = 2
    draws_in_order = True

    def padded(self, args: tuple[Arg, ...], extents: Mapping[int, Extent]) -> tuple[Arg, ...]:
        return (*args, tuple((dim, *extent) for dim, extent in extents.items()))

    def in_zigzag(
        self, args: tuple[Arg, ...], places: Mapping[int, int], length: int, ranks: int
    ) -> tuple[Arg, ...]:
        extents = args[3] if len(args) > 3 else ()
        orders = tuple((dim, outer, length, ranks) for dim, outer in sorted(places.items()))
        return (*args[:3], extents, orders)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        """The same mask, drawn again from the same hash, on the cotangent."""
        return [context.call(self.op, context.grad, *context.node.args[1:])]

    def bind(self, binding: BindingContext) -> Kernel:
        """A sequence that is padded, or in another order, draws the numbers that it would if it
        were not."""
        x, p, op_id, *rest = binding.node.args
        extents, orders = (*rest, (), ())[:2]
        coords = list(binding.coordinates(x.placed.dims))
        shape = list(x.tensor.shape)
        found = {dim: binding.positions(x.placed.dims[dim]) for dim, *_ in (*extents, *orders)}
        for dim, outer, length, ranks in orders:
            inner = shape[dim] // (outer * length)
            stored = found[dim] // inner % length
            moved = Part(length, ranks, "zigzag").position(stored) - stored
            coords[dim] = found[dim] = found[dim] + moved * inner
        for dim, *sizes in extents:
            extent = Extent(*sizes)
            shape[dim] = extent.true
            if extent.before > 1:
                coords[dim] = true_positions(found[dim], extent)
        index = binding.index(op_id, shape, tuple(coords))
        return lambda tensor: dropout(tensor, p, index())
