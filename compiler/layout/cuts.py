"""Cuts: the normal form beneath layouts.

A `Cut` (stride, size, axis) says that the digit of weight `stride` and base `size` in an index is
the rank's coordinate on `axis`. The cuts of a product of factors form a chain: each stride is a
multiple of the stride times the size of the next smaller one. `Part`s are stretches of a dim that
share their cuts; a part's length is a multiple of its period, the extent of its largest cut.
Neighbouring parts with the same cuts are one part, which makes the list of parts unique.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from meshwright.compiler.layout.factors import Dim, Factor, Segment, check_factor
from meshwright.compiler.layout.mesh import Mesh


class Cut(NamedTuple):
    """The digit of weight `stride` and base `size` of an index is a coordinate on `axis`."""

    stride: int
    size: int
    axis: str

    @property
    def extent(self) -> int:
        return self.stride * self.size


Cuts = tuple[Cut, ...]


class Part(NamedTuple):
    """`length` neighbouring elements of a dim under the same cuts, major first."""

    length: int
    cuts: Cuts

    @property
    def period(self) -> int:
        """The smallest stretch after which ownership repeats."""
        return self.cuts[0].extent if self.cuts else 1

    @property
    def local_length(self) -> int:
        """How many of its elements each rank holds."""
        return self.length // math.prod(cut.size for cut in self.cuts)

    def without(self, axes: frozenset[str]) -> Part:
        """Not cut by `axes`; the other cuts stay."""
        return Part(self.length, tuple(cut for cut in self.cuts if cut.axis not in axes))

    def digits(self) -> list[tuple[int, str | None]]:
        """(base, axis) of the digits of an index, major first; no axis for what lies between."""
        found: list[tuple[int, str | None]] = []
        bound = self.length
        for cut in self.cuts:
            if bound != cut.extent:
                found.append((bound // cut.extent, None))
            found.append((cut.size, cut.axis))
            bound = cut.stride
        return found if bound == 1 and found else [*found, (bound, None)]


Parts = tuple[Part, ...]


def is_chain(cuts: Cuts, length: int) -> bool:
    """Whether cuts, major first, take disjoint digits of an index below `length`."""
    bound = length
    for cut in cuts:
        if bound % cut.extent:
            return False
        bound = cut.stride
    return True


def ordered(cuts: Iterable[Cut]) -> Cuts:
    """Major first."""
    return tuple(sorted(cuts, reverse=True))


@lru_cache(maxsize=65536)
def parts_of(dim: Dim, mesh: Mesh) -> Parts:
    """The parts of a dim; raises LayoutError where a factor does not divide."""
    return merged(_segment_part(segment, mesh) for segment in dim)


def merged(parts: Iterable[Part]) -> Parts:
    """Neighbours with the same cuts joined; empty parts dropped."""
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].cuts == part.cuts:
            joined[-1] = Part(joined[-1].length + part.length, part.cuts)
        elif part.length:
            joined.append(part)
    return tuple(joined) or (Part(0, ()),)


def _segment_part(segment: Segment, mesh: Mesh) -> Part:
    sizes = dict(mesh.axes)
    stride, cuts = 1, []
    for factor in reversed(segment):
        check_factor(factor, mesh)
        above = stride * factor.size
        # Blocks are contiguous: the axes take a factor's major digits.
        stride_in_factor = above
        for axis in factor.axes:
            stride_in_factor //= sizes[axis]
            if sizes[axis] > 1:
                cuts.append(Cut(stride_in_factor, sizes[axis], axis))
        stride = above
    return Part(stride, ordered(cuts))


def dim_of(parts: Parts) -> Dim:
    """The canonical spelling of parts."""
    return tuple(_segment_of(part) for part in parts)


def _segment_of(part: Part) -> Segment:
    """A new factor begins wherever elements remain between one cut and the next."""
    factors: list[Factor] = []
    top = part.length
    axes: tuple[str, ...] = ()
    bound = part.length
    for cut in part.cuts:
        if cut.extent != bound:
            if top != cut.extent:
                factors.append(Factor(top // cut.extent, axes))
            top, axes = cut.extent, ()
        axes, bound = (*axes, cut.axis), cut.stride
    factors.append(Factor(top, axes))
    return tuple(factors)
