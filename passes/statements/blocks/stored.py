"""Layouts in which parameters are stored further split than operators use them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.compiler.layout.factors import Factor, Segment, local_size
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh


def split_further(used: Layout, axes: tuple[str, ...], mesh: Mesh) -> Layout:
    """The layout, its parts split over `axes` as well: along the first dim that divides.

    Where none does, storage adds entries, as few as it can: the dim is longer than it was.
    """
    return min(_ways(used, axes, mesh), key=_cost).layout


@dataclass(frozen=True, slots=True)
class _Way:
    """A layout in which a parameter may be stored: `added` are the entries that storage adds, and
    `moved` whether what is gathered has to be rearranged in memory."""

    layout: Layout
    dim: int
    added: int
    moved: bool


def _cost(way: _Way) -> tuple[int, bool, int]:
    return way.added, way.moved, way.dim


def _ways(used: Layout, axes: tuple[str, ...], mesh: Mesh) -> Iterator[_Way]:
    """The ways to split what a rank uses further: along the last factor of a dim's segments."""
    local = used.local_shape(mesh)
    for i, dim in enumerate(used.dims):
        split = tuple(_split_further(segment, axes, mesh) for segment in dim)
        layout = used.with_dims((*used.dims[:i], split, *used.dims[i + 1 :]))
        before = math.prod(local[:i]) * local_size((dim[0][:-1],), mesh)
        moved = before > 1 or len(dim) > 1
        yield _Way(layout, i, math.prod(layout.shape) - math.prod(used.shape), moved)


def _split_further(segment: Segment, axes: tuple[str, ...], mesh: Mesh) -> Segment:
    (*major, minor) = segment
    parts = mesh.size((*minor.axes, *axes))
    return (*major, Factor(-(-minor.size // parts) * parts, (*minor.axes, *axes)))
