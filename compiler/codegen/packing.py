"""Send multiple tensors as one: pack what each rank gives, and take apart what arrives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import methodcaller

import torch
from torch import Tensor

from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.collectives import Transfer
from meshwright.compiler.layout.local_ops import LocalOp, Reshape, apply_all, shape_after
from meshwright.compiler.layout.wires import WIRES, Wire


@dataclass(frozen=True, slots=True)
class Packing:
    """The operands of a collective as one flat tensor: `transfers` are those of each alone.

    For wires that give each of n members its own entry, what is packed is [n, elements]; for those
    that stack what members give, what arrives is. All else is flat.
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
        divided = WIRES[self.wire.kind].divided
        lead = (context.mesh.size(self.wire.axes),) if divided else ()
        flat = [
            _steps((*transfer.before, Reshape((*lead, math.prod(shape)))), context)
            for transfer, shape in zip(self.transfers, self._arriving(context), strict=True)
        ]

        def pack(*operands: Tensor) -> Tensor:
            return torch.cat([each(given) for each, given in zip(flat, operands, strict=True)], -1)

        return pack

    def unpack(self, context: RankContext) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The results of one rank, out of what arrives."""
        shapes = self._arriving(context)
        sizes = [math.prod(shape) for shape in shapes]
        lead = (context.mesh.size(self.wire.axes),) if WIRES[self.wire.kind].stacks else ()
        result = [
            _steps((Reshape((*lead, *shape)), *transfer.after), context)
            for transfer, shape in zip(self.transfers, shapes, strict=True)
        ]

        def unpack(flat: Tensor) -> tuple[Tensor, ...]:
            parts = torch.split_with_sizes(flat, sizes, -1)
            return tuple([each(part) for each, part in zip(result, parts, strict=True)])

        return unpack

    def _arriving(self, context: RankContext) -> Sequence[tuple[int, ...]]:
        """The shape of what one member gives to another, by operand."""
        divided = int(WIRES[self.wire.kind].divided)
        return [
            shape_after(transfer.before, operand.placed.local_shape(context.mesh))[divided:]
            for transfer, operand in zip(self.transfers, self.node.args, strict=True)
        ]


def _steps(steps: Sequence[LocalOp], context: RankContext) -> Callable[[Tensor], Tensor]:
    """Steps of one rank as a function; of reshapes in a row the last says it all."""
    kept = [
        each
        for each, following in zip_longest(steps, steps[1:])
        if not (isinstance(each, Reshape) and isinstance(following, Reshape))
    ]
    if len(kept) == 1 and isinstance(kept[0], Reshape):
        return methodcaller("reshape", kept[0].shape)
    return lambda tensor: apply_all(kept, tensor, context.coords, context.mesh)
