"""Extents: where the padding of a sequence lies in a dim.

A sequence of 17 that is padded to 18 is a dim of its own in `[b, 18, d]`, and a factor of a dim in
`[b·18, d]`. A view leads from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


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
