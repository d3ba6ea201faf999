"""Extents: where padding lies in a dim.

A sequence of 17 that is padded to 18 is a dim of its own in `[b, 18, d]`, and a factor of a dim in
`[b·18, d]`. A view leads from one to the other. What storage adds to a parameter is the padding of
one dim: 66 entries that two ranks use half each are stored as `2·36` where four ranks share a half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meshwright.compiler.layout.factors import Segment
from meshwright.compiler.layout.layout import Layout, shard
from meshwright.compiler.layout.mesh import Mesh


class Extent(NamedTuple):
    """A dim of `before · size · after` elements, stored as `before · padded · after`."""

    before: int
    size: int
    padded: int
    after: int

    @property
    def true(self) -> int:
        """The size of the dim without its padding."""
        return self.before * self.size * self.after

    @property
    def stored(self) -> int:
        """The size of the dim with its padding."""
        return self.before * self.padded * self.after


class Padding(NamedTuple):
    """The entries that storage adds to `dim` of a tensor: an extent for each segment of the dim."""

    dim: int
    extents: tuple[Extent, ...]

    def added(self, value: Tensor, fill: float = 0) -> Tensor:
        """The tensor with what storage adds, which is `fill`."""
        pieces = torch.split_with_sizes(value, [extent.true for extent in self.extents], self.dim)
        longer = [self._longer(*each, fill) for each in zip(pieces, self.extents, strict=True)]
        return torch.cat(longer, self.dim)

    def cut(self, value: Tensor) -> Tensor:
        """The tensor without what storage adds."""
        pieces = torch.split_with_sizes(value, [extent.stored for extent in self.extents], self.dim)
        true = [self._true(*each) for each in zip(pieces, self.extents, strict=True)]
        return true[0] if len(true) == 1 else torch.cat(true, self.dim)

    def _longer(self, piece: Tensor, extent: Extent, fill: float) -> Tensor:
        apart = self._apart(piece, extent.before, extent.size * extent.after)
        shape = list(apart.shape)
        shape[self.dim + 1] = (extent.padded - extent.size) * extent.after
        longer = torch.cat([apart, apart.new_full(shape, fill)], self.dim + 1)
        return longer.flatten(self.dim, self.dim + 1)

    def _true(self, piece: Tensor, extent: Extent) -> Tensor:
        apart = self._apart(piece, extent.before, extent.padded * extent.after)
        kept = apart.narrow(self.dim + 1, 0, extent.size * extent.after)
        return kept.flatten(self.dim, self.dim + 1)

    def _apart(self, piece: Tensor, *sizes: int) -> Tensor:
        shape = piece.shape
        return piece.reshape(*shape[: self.dim], *sizes, *shape[self.dim + 1 :])


def padding_between(used: Layout, stored: Layout, mesh: Mesh) -> Padding | None:
    """What `stored` adds to `used`, if anything: entries at the end of each block of one dim.

    A segment of the one dim is that of the other but for the size and the axes of its last factor.
    """
    for place, (dim, longer) in enumerate(zip(used.dims, stored.dims, strict=True)):
        if used.shape[place] != stored.shape[place]:
            pairs = zip(dim, longer, strict=True)
            return Padding(place, tuple(_extent(*pair, mesh) for pair in pairs))
    return None


def _extent(used: Segment, stored: Segment, mesh: Mesh) -> Extent:
    (*major, minor) = used
    before = math.prod(factor.size for factor in major) * mesh.size(minor.axes)
    padded = math.prod(factor.size for factor in stored) // before
    return Extent(before, minor.size // mesh.size(minor.axes), padded, 1)


def held_indices(
    shape: Sequence[int],
    layout: Layout,
    paddings: Sequence[Padding],
    mesh: Mesh,
    coords: Mapping[str, int],
) -> list[Tensor]:
    """For each dim of a tensor, the global index of each entry that the rank at `coords` holds, or
    -1 for one that storage adds; `shape` is without padding."""
    found = []
    for dim, (size, spelling) in enumerate(zip(shape, layout.dims, strict=True)):
        indices = torch.arange(size)
        for padding in paddings:
            if padding.dim == dim:
                indices = padding._replace(dim=0).added(indices, -1)
        found.append(shard(indices, Layout((spelling,)), mesh, coords))
    return found


def moved(
    extent: Extent, dim: int, shape: Sequence[int], new_shape: Sequence[int]
) -> tuple[int, Extent] | None:
    """The dim of a view in `new_shape` that holds the padded factor of `dim`, and its extent there.

    Both shapes are without padding. None where the factor is spread over multiple dims.
    """
    low = math.prod(shape[dim + 1 :]) * extent.after
    high = low * extent.size
    found = []
    for place, size in enumerate(new_shape):
        below = math.prod(new_shape[place + 1 :])
        above = below * size
        if below and low % below == 0 and above >= high and above % high == 0:
            own = Extent(above // high, extent.size, extent.padded, low // below)
            found.append((place, own))
    # A size of 1 may stand at more than one place: the one where it was is the sequence.
    return min(found, key=lambda item: abs(item[0] - dim), default=None)


def true_positions(positions: Tensor, extent: Extent) -> Tensor:
    """Positions in the stored dim as positions in the dim without padding.

    A pad entry gets the position of another entry, or one outside of the dim.
    """
    inner = positions % extent.after
    along = positions.div(extent.after, rounding_mode="floor") % extent.padded
    outer = positions.div(extent.after * extent.padded, rounding_mode="floor")
    return (outer * extent.size + along) * extent.after + inner
