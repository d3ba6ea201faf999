"""Reshapes of layouts: a view regroups factors and never communicates.

Every cut takes one digit of the tensor's flat index. A reshape moves the borders between dims, so
a cut survives where its digit falls inside one new dim, and the element order on each rank is that
of the reshaped shard.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, NoReturn

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.cuts import (
    Cut,
    Interval,
    Intervals,
    dim_of,
    intervals_of,
    is_chain,
    ordered,
)
from meshwright.compiler.layout.factors import (
    Dim,
    Factor,
    Segment,
    dim_axes,
    format_dim,
    spelled_dim,
    whole,
)
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh


class _Span(NamedTuple):
    """A dim as digits of the flat index: weights from `low` up to, but not including, `high`."""

    low: int
    high: int
    size: int


@lru_cache(maxsize=65536)
def reshape(layout: Layout, new_shape: tuple[int, ...], mesh: Mesh) -> Layout:
    """The canonical layout of the view in `new_shape` (no -1) of a tensor in `layout`.

    Each rank's shard of the view is the view of its shard. Partial and varying axes stay. Raises
    LayoutError where a new border goes through a cut, with the composite dim that would work.
    """
    if math.prod(layout.shape) != math.prod(new_shape):
        raise LayoutError(
            f"`{layout}` has {math.prod(layout.shape)} elements, `{_text(new_shape)}` has "
            f"{math.prod(new_shape)}",
            code="wrong-size",
            help="reshape to a shape of as many elements",
        )
    if layout.shape == new_shape:
        return layout.canonical(mesh)
    if not layout.split_axes:
        return layout.with_dims(whole(size) for size in new_shape).canonical(mesh)
    if 0 in new_shape:
        raise LayoutError(
            f"a reshape of the empty `{layout}` cannot keep its cuts",
            code="empty-reshape",
            help="leave the tensor whole",
        )
    return _Reshape(layout, new_shape, mesh).result()


def factors_for(layout: Layout, new_shape: tuple[int, ...], mesh: Mesh) -> str | None:
    """The split dim of `layout` as a plan would write it so that the view becomes possible.

    None where the view is possible already, or no such spelling is known.
    """
    try:
        reshape(layout, new_shape, mesh)
    except LayoutError:
        pass
    else:
        return None
    found = _Reshape(layout, new_shape, mesh)
    dim = next(i for i, each in enumerate(layout.dims) if dim_axes(each))
    factors = found.factors(dim)
    return None if factors is None else spelled_dim((factors,))


class _Reshape:
    """One reshape under way: the old dims and the new ones, both as spans of the flat index."""

    def __init__(self, layout: Layout, new_shape: tuple[int, ...], mesh: Mesh) -> None:
        self.layout, self.new_shape, self.mesh = layout, new_shape, mesh
        self.old = _spans(layout.shape)
        self.new = _spans(new_shape)
        self.flat: list[tuple[Cut, int]] = []
        self.segmented: dict[int, tuple[_Span, Intervals]] = {}
        for dim, span in enumerate(self.old):
            self._read(dim, span)

    def _read(self, dim: int, span: _Span) -> None:
        """Note the cuts of an old dim by their weight in the flat index."""
        intervals = intervals_of(self.layout.dims[dim], self.mesh)
        if len(intervals) == 1:
            self.flat += [(_scaled(cut, span.low), dim) for cut in intervals[0].cuts]
        else:
            self.segmented[dim] = (span, intervals)

    def result(self) -> Layout:
        hosts = {dim: self._host(dim) for dim in self.segmented}
        dims: list[Dim] = []
        for place, span in enumerate(self.new):
            inside = [cut for cut, _ in self.flat if _holds(span, cut)]
            guest = next((dim for dim, host in hosts.items() if host == place), None)
            dims.append(dim_of(self._intervals(span, inside, guest)))
        for cut, dim in self.flat:
            if not any(_holds(span, cut) for span in self.new):
                self._fail_at(cut, dim)
        return Layout(tuple(dims), self.layout.partial, self.layout.varying).canonical(self.mesh)

    def _host(self, dim: int) -> int:
        """The new dim that takes a concatenation: the one that ends where the old one does."""
        span, intervals = self.segmented[dim]
        for place, new in enumerate(self.new):
            fits = all(interval.length * span.low % new.low == 0 for interval in intervals)
            if new.high == span.high and new.size > 1 and fits:
                return place
        raise LayoutError(
            f"the concatenation `{format_dim(self.layout.dims[dim])}` cannot be cut into "
            f"`{_text(self.new_shape)}`",
            code="cut-concatenation",
            culprit=str(self.layout),
            help="split the tensor at the segments before the reshape",
        )

    def _intervals(self, span: _Span, inside: list[Cut], guest: int | None) -> Intervals:
        """The intervals of a new dim, from the cuts inside it and the concatenation it takes."""
        if guest is None:
            return (self._interval(span, span.size, inside, 0),)
        old, intervals = self.segmented[guest]
        found = []
        for interval in intervals:
            cuts = [*inside, *(_scaled(cut, old.low) for cut in interval.cuts)]
            found.append(self._interval(span, interval.length * old.low // span.low, cuts, guest))
        return tuple(found)

    def _interval(self, span: _Span, length: int, flat: list[Cut], dim: int) -> Interval:
        cuts = ordered(Cut(cut.stride // span.low, cut.size, cut.axis) for cut in flat)
        below = [cut for cut in flat if cut.stride % span.low]
        if below or not is_chain(cuts, length):
            self._fail_at((below or flat)[0], dim)
        return Interval(length, cuts)

    def _fail_at(self, cut: Cut, dim: int) -> NoReturn:
        raise LayoutError(
            f"`{format_dim(self.layout.dims[dim])}` cannot be cut into "
            f"`{_text(self._pieces(dim))}` with `{cut.axis}` over {cut.size} ranks",
            code="cut-view",
            culprit=str(self.layout),
            help=self._help(dim),
        )

    def _pieces(self, dim: int) -> tuple[int, ...]:
        """The new dims that share flat digits with an old one."""
        old = self.old[dim]
        near = [new for new in self.new if new.low < old.high and new.high > old.low]
        return tuple(new.size for new in near)

    def _help(self, dim: int) -> str:
        """What to write instead."""
        factors = self.factors(dim)
        if factors is None:
            return f"leave the dim whole over {', '.join(f'`{axis}`' for axis in self._axes(dim))}"
        return f"write the dim as `{format_dim((factors,))}`"

    def _axes(self, dim: int) -> tuple[str, ...]:
        """The axes that cut an old dim."""
        return tuple(axis for axis in dim_axes(self.layout.dims[dim]) if self.mesh.size(axis) > 1)

    def factors(self, dim: int) -> Segment | None:
        """An old dim as the product of its new dims, the axes on the first that they divide."""
        axes = self._axes(dim)
        ranks, pieces = self.mesh.size(axes), self._pieces(dim)
        place = next((i for i, size in enumerate(pieces) if size % ranks == 0), None)
        if place is None or math.prod(pieces) != self.old[dim].size:
            return None
        return tuple(Factor(size, axes if i == place else ()) for i, size in enumerate(pieces))


def _spans(shape: tuple[int, ...]) -> list[_Span]:
    low, found = 1, []
    for size in reversed(shape):
        found.append(_Span(low, low * size, size))
        low *= size
    return found[::-1]


def _scaled(cut: Cut, by: int) -> Cut:
    return Cut(cut.stride * by, cut.size, cut.axis)


def _holds(span: _Span, cut: Cut) -> bool:
    """Whether the cut's digit lies inside one dim."""
    inside = span.low <= cut.stride and cut.extent <= span.high
    return inside and cut.stride % span.low == 0 and span.high % cut.extent == 0


def _text(shape: tuple[int, ...]) -> str:
    return "·".join(str(size) for size in shape) or "1"
