"""Layouts of what a grid of ranks, two axes of the mesh, holds in blocks: rows over one axis, and
columns over the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.factors import Dim, Factor, cut, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.notation import (
    Call,
    Group,
    Operand,
    Placement,
    Spec,
)
from meshwright.compiler.placing.rules.placements import vary_operands, without_axes

Dims = tuple[Dim, ...]


def over(dim: Dim, axis: str) -> Dim:
    """The dim, if that axis alone cuts it; else in equal blocks over it."""
    size = Layout((dim,)).shape[0]
    return dim if dim_axes(dim) == (axis,) else cut(size, axis)


def renamed(dim: Dim, old: str, new: str) -> Dim:
    """The dim with one axis in place of another."""
    return tuple(
        tuple(
            Factor(each.size, tuple(new if axis == old else axis for axis in each.axes))
            for each in segment
        )
        for segment in dim
    )


def rows_over(
    dims: Iterable[Dim], axes: Sequence[str], col: str, mesh: Mesh, *, swapped: bool = False
) -> Dims:
    """The leading dims of activations, whole over `col` and split over each of `axes`: where one
    cuts none of them, it cuts the first that divides further. Where axes are `swapped` afterwards,
    the dim that the last of them cuts divides over `col` in its place too. Raises LayoutError
    without any."""
    found = [without_axes(dim, frozenset({col})) for dim in dims]
    if swapped:
        found = [_swappable(dim, axes[-1], col, mesh) for dim in found]
    for axis in axes:
        if any(axis in dim_axes(dim) for dim in found):
            continue
        also = col if swapped and axis == axes[-1] else axis
        divides = (_divides(dim, axis, mesh) and _divides(dim, also, mesh) for dim in found)
        place = next((i for i, both in enumerate(divides) if both), None)
        if place is None:
            raise LayoutError(
                f"none of the leading dims of `{Layout(tuple(found))}` divides over `{axis}`",
                code="does-not-divide",
                help="have a batch that the ranks divide",
            )
        ((major, *minor),) = found[place]
        found[place] = ((Factor(major.size, (*major.axes, axis)), *minor),)
    return tuple(found)


def _swappable(dim: Dim, old: str, new: str, mesh: Mesh) -> Dim:
    """The dim, without the axis `old` where it does not divide over `new` in its place."""
    if all(
        factor.size % mesh.size(factor.axes) == 0
        for segment in renamed(dim, old, new)
        for factor in segment
    ):
        return dim
    return without_axes(dim, frozenset({old}))


def _divides(dim: Dim, axis: str, mesh: Mesh) -> bool:
    (major, *_), *more = dim
    return not more and major.size % mesh.size((*major.axes, axis)) == 0


def placement(
    call: Call,
    dims: Sequence[Dims],
    results: Sequence[Dims],
    grid: Iterable[str],
    linear: Sequence[Group] = (frozenset({0}), frozenset({1})),
) -> Placement:
    """The placement with these dims of operands and results.

    What splits operands and not a result is summed over, which leaves it pending; the axes of the
    `grid` are summed over by the operator itself. Sums that are pending in all operands of a
    `linear` group stay so.
    """
    cutting = {axis for own in dims for dim in own for axis in dim_axes(dim)}
    group, pending = _pending(call, linear, cutting)
    layouts = [
        Layout(
            own,
            tuple((axis, "sum") for axis in pending if i in group),
            tuple(axis for axis in operand.layout.varying if axis not in _axes(own)),
        )
        for i, (operand, own) in enumerate(zip(call.operands, dims, strict=True))
    ]
    operands = vary_operands(layouts, call, Spec((), ()), frozenset(cutting))
    varying = {axis for each in operands for axis in each.varying}

    def result(own: Dims) -> Layout:
        sums = {*cutting.difference(_axes(own), grid), *pending}
        partial = tuple((axis, "sum") for axis in sorted(sums))
        return Layout(own, partial, tuple(sorted(varying.difference(_axes(own), sums))))

    return Placement(operands, tuple(map(result, results)))


def _axes(dims: Dims) -> set[str]:
    return {axis for dim in dims for axis in dim_axes(dim)}


def _pending(call: Call, linear: Sequence[Group], used: set[str]) -> tuple[Group, tuple[str, ...]]:
    """The first group of operands with pending sums that may stay so, and the axes of those."""
    for group in linear:
        operands = [call.operands[i] for i in sorted(group)]
        shared = set.intersection(*(set(_sums(each)) for each in operands)) - used
        if shared:
            return group, tuple(sorted(shared))
    return frozenset(), ()


def _sums(operand: Operand) -> Iterable[str]:
    return (axis for axis, kind in operand.layout.partial if kind == "sum")
