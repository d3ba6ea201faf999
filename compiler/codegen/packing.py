"""Send multiple tensors as one: pack what each rank gives, and take apart what arrives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.collectives import Transfer
from meshwright.compiler.layout.local_ops import apply_all
from meshwright.compiler.layout.wires import WIRES, Wire


@dataclass(frozen=True, slots=True)
class Packing:
    """The operands of a collective as one flat tensor: `transfers` are those of each alone.

    Of wires that give each member its entry of [n, ...], what is packed is [n, elements]; of those
    that stack what the members give, what arrives is.
    """

    node: Node
    transfers: tuple[Transfer, ...]

    @property
    def wire(self) -> Wire:
        """The wire that carries them all."""
        (wire,) = {each.wire for each in self.transfers}
        assert wire is not None
        return wire

    def pack(self, context: RankContext) -> Callable[..., Tensor]:
        """The flat tensor of one rank's operands."""
        dim = int(WIRES[self.wire.kind].divided)

        def pack(*operands: Tensor) -> Tensor:
            given = [
                apply_all(transfer.before, operand, context.coords, context.mesh)
                for transfer, operand in zip(self.transfers, operands, strict=True)
            ]
            return torch.cat([each.flatten(dim) for each in given], dim)

        return pack

    def unpack(self, context: RankContext) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The results of one rank, out of what arrives."""
        shapes = self._arriving(context)
        sizes = [math.prod(shape) for shape in shapes]

        def unpack(flat: Tensor) -> tuple[Tensor, ...]:
            parts = torch.split_with_sizes(flat, sizes, -1)
            return tuple(
                apply_all(
                    transfer.after,
                    part.reshape(*flat.shape[:-1], *shape),
                    context.coords,
                    context.mesh,
                )
                for transfer, part, shape in zip(self.transfers, parts, shapes, strict=True)
            )

        return unpack

    def _arriving(self, context: RankContext) -> Sequence[tuple[int, ...]]:
        """The shape of what one member gives to another, by operand."""
        found = []
        for transfer, operand in zip(self.transfers, self.node.args, strict=True):
            like = torch.empty(operand.placed.local_shape(context.mesh), device="meta")
            given = apply_all(transfer.before, like, context.coords, context.mesh)
            found.append(tuple(given.shape[int(WIRES[self.wire.kind].divided) :]))
        return found
