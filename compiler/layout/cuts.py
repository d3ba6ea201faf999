"""Cuts: the normal form beneath layouts.

A `Cut` (stride, size, axis) says that the digit of weight `stride` and base `size` in an index is
the rank's coordinate on `axis`. The cuts of a product of factors form a chain: each stride is a
multiple of the stride times the size of the next smaller one. An `Interval` is a run of elements of
a dim under the same cuts; its length is a multiple of its period, the extent of its largest cut.
Neighbouring intervals with the same cuts are joined, so that a dim has one list of them.
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


class Interval(NamedTuple):
    """`length` neighbouring elements of a dim under the same cuts, major first."""

    length: int
    cuts: Cuts

    @property
    def period(self) -> int:
        """The number of elements after which ownership repeats."""
        return self.cuts[0].extent if self.cuts else 1

    @property
    def local_length(self) -> int:
        """The number of its elements that each rank holds."""
        return self.length // math.prod(cut.size for cut in self.cuts)

    def without(self, axes: frozenset[str]) -> Interval:
        """The interval without the cuts by `axes`."""
        return Interval(self.length, tuple(cut for cut in self.cuts if cut.axis not in axes))

    def digits(self) -> list[tuple[int, str | None]]:
        """The digits of an index as (base, axis), major first; between cuts the axis is None."""
        found: list[tuple[int, str | None]] = []
        bound = self.length
        for cut in self.cuts:
            if bound != cut.extent:
                found.append((bound // cut.extent, None))
            found.append((cut.size, cut.axis))
            bound = cut.stride
        return found if bound == 1 and found else [*found, (bound, None)]


Intervals = tuple[Interval, ...]


def is_chain(cuts: Cuts, length: int) -> bool:
    """Whether cuts, major first, take disjoint digits of an index below `length`."""
    bound = length
    for cut in cuts:
        if bound % cut.extent:
            return False
        bound = cut.stride
    return True


def ordered(cuts: Iterable[Cut]) -> Cuts:
    """The cuts, major first."""
    return tuple(sorted(cuts, reverse=True))


@lru_cache(maxsize=65536)
def intervals_of(dim: Dim, mesh: Mesh) -> Intervals:
    """The intervals of a dim; raises LayoutError where a factor does not divide."""
    return _merged(_segment_interval(segment, mesh) for segment in dim)


def _merged(intervals: Iterable[Interval]) -> Intervals:
    """Neighbours with the same cuts joined; empty intervals dropped."""
    joined: list[Interval] = []
    for interval in intervals:
        if joined and joined[-1].cuts == interval.cuts:
            joined[-1] = Interval(joined[-1].length + interval.length, interval.cuts)
        elif interval.length:
            joined.append(interval)
    return tuple(joined) or (Interval(0, ()),)


def _segment_interval(segment: Segment, mesh: Mesh) -> Interval:
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
    return Interval(stride, ordered(cuts))


def dim_of(intervals: Iterable[Interval]) -> Dim:
    """The canonical spelling of a dim in these intervals, neighbours with the same cuts joined."""
    return tuple(_segment_of(interval) for interval in _merged(intervals))


def _segment_of(interval: Interval) -> Segment:
    """A new factor begins wherever elements remain between one cut and the next."""
    factors: list[Factor] = []
    top = interval.length
    axes: tuple[str, ...] = ()
    bound = interval.length
    for cut in interval.cuts:
        if cut.extent != bound:
            if top != cut.extent:
                factors.append(Factor(top // cut.extent, axes))
            top, axes = cut.extent, ()
        axes, bound = (*axes, cut.axis), cut.stride
    factors.append(Factor(top, axes))
    return tuple(factors)
