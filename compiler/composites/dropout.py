"""Dropout whose mask is a hash of the global element index: the same under every layout."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.compiler.graph.ir import Arg, MeshOp
from meshwright.compiler.kernels.dropout import dropout
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
    """`dropout(x, p, op_id[, extents])`; `extents` are the dims of x that are padded sequences."""

    op = MeshOp("dropout")
    rule = Row("... -> ...")
    number = 2

    def padded(self, args: tuple[Arg, ...], extents: Mapping[int, Extent]) -> tuple[Arg, ...]:
        return (*args, tuple((dim, *extent) for dim, extent in extents.items()))

    def adjoint(self, context: AdjointContext) -> Cotangents:
        """The same mask, drawn again from the same hash, on the cotangent."""
        return [context.call(self.op, context.grad, *context.node.args[1:])]

    def bind(self, binding: BindingContext) -> Kernel:
        """A sequence that is padded draws the numbers that it would without its padding."""
        x, p, op_id, *extents = binding.node.args
        coords = list(binding.coordinates(x.placed.dims))
        shape = list(x.tensor.shape)
        for dim, *sizes in extents[0] if extents else ():
            extent = Extent(*sizes)
            shape[dim] = extent.true
            if extent.before > 1:
                coords[dim] = true_positions(binding.positions(x.placed.dims[dim]), extent)
        index = binding.index(op_id, shape, tuple(coords))
        return lambda tensor: dropout(tensor, p, index())
