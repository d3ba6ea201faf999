"""Dims under slicing, joining and repeating: how the result is split.

Each rank must be able to make its part of the result from its own part, else LayoutError is raised.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.cuts import Cut, Interval, dim_of, intervals_of
from meshwright.compiler.layout.factors import Dim, cut, dim_axes, dim_size, format_dim, whole
from meshwright.compiler.layout.mesh import Mesh


def slice_dim(dim: Dim, start: int, stop: int, mesh: Mesh) -> Dim:
    """The elements from `start` up to `stop`, which must be whole periods of the cuts."""
    if not dim_axes(dim):
        return whole(stop - start)
    found: list[Interval] = []
    position = 0
    for interval in intervals_of(dim, mesh):
        low, high = max(start, position), min(stop, position + interval.length)
        if low < high:
            if (low - position) % interval.period or (high - low) % interval.period:
                raise _refused(f"`{start}:{stop}` of `{format_dim(dim)}`")
            found.append(Interval(high - low, interval.cuts))
        position += interval.length
    if not found:
        raise _refused(f"an empty slice of `{format_dim(dim)}`")
    return dim_of(found)


def extend_dim(dim: Dim, start: int, size: int, mesh: Mesh) -> Dim:
    """A dim of `size` under the same cuts, of which `dim` is the slice that begins at `start`."""
    intervals = intervals_of(dim, mesh)
    if len(intervals) > 1 or start % intervals[0].period or size % intervals[0].period:
        raise _refused(f"`{format_dim(dim)}` at {start} of {size}")
    return dim_of((Interval(size, intervals[0].cuts),))


def join_dims(dims: Iterable[Dim], mesh: Mesh) -> Dim:
    """One dim after the other; every axis cuts all of them or none."""
    dims = tuple(dims)
    if len({frozenset(dim_axes(dim)) for dim in dims}) > 1:
        raise _refused(" after ".join(f"`{format_dim(dim)}`" for dim in dims))
    return dim_of(interval for dim in dims for interval in intervals_of(dim, mesh))


def repeat_dim(dim: Dim, count: int, mesh: Mesh) -> Dim:
    """The whole dim `count` times over."""
    return dim_of(intervals_of(dim, mesh) * count)


def interleave_dim(dim: Dim, count: int, mesh: Mesh) -> Dim:
    """Each element `count` times."""
    return dim_of(
        Interval(
            interval.length * count,
            tuple(Cut(item.stride * count, item.size, item.axis) for item in interval.cuts),
        )
        for interval in intervals_of(dim, mesh)
    )


def resized(dim: Dim, size: int, mesh: Mesh) -> Dim:
    """A dim of another size, cut into as many blocks."""
    if dim_size(dim) == size:
        return dim
    axes = dim_axes(dim)
    if len(dim) > 1 or len(dim[0]) > 1 or size % mesh.size(axes):
        raise _refused(f"`{format_dim(dim)}` as a dim of {size}")
    return cut(size, *axes)


def _refused(what: str) -> LayoutError:
    return LayoutError(
        f"{what} is not a layout of equal shares",
        code="cut-slice",
        help="cut at the borders of the split factors, or leave the dim whole",
    )
