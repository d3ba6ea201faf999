"""Factors: a dim written as products of sizes, each cut over mesh axes."""

from __future__ import annotations

import math
from typing import NamedTuple

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.mesh import Mesh


class Factor(NamedTuple):
    """`size` elements, cut into equal blocks over `axes`, the first of which is the major one."""

    size: int
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if len(self.axes) > 1:
            return f"{self.size}@({', '.join(self.axes)})"
        return f"{self.size}@{self.axes[0]}" if self.axes else str(self.size)


Segment = tuple[Factor, ...]
Dim = tuple[Segment, ...]


def whole(size: int) -> Dim:
    """A dim that no axis cuts."""
    return ((Factor(size),),)


def cut(size: int, *axes: str) -> Dim:
    """A dim in equal blocks over `axes`, the first of which is the major one."""
    return ((Factor(size, axes),),)


def dim_size(dim: Dim) -> int:
    """The global size of a dim."""
    if len(dim) == 1 and len(dim[0]) == 1:
        return dim[0][0].size
    return sum(math.prod(factor.size for factor in segment) for segment in dim)


def dim_axes(dim: Dim) -> tuple[str, ...]:
    """The axes that cut a dim, each once, in order."""
    if len(dim) == 1 and len(dim[0]) == 1:
        return dim[0][0].axes
    found = (axis for segment in dim for factor in segment for axis in factor.axes)
    return tuple(dict.fromkeys(found))


def format_dim(dim: Dim) -> str:
    """`128@tp`, `3·12@tp·64`, or `(8@tp·64 | 2@tp·64)` for a concatenation."""
    segments = ["·".join(str(factor) for factor in segment) or "1" for segment in dim]
    return segments[0] if len(segments) == 1 else f"({' | '.join(segments)})"


def spelled_dim(dim: Dim) -> str:
    """The dim as a plan writes it: `(3 128@tp)`, or `(64@tp | 32@tp)` for a concatenation."""
    segments = [" ".join(str(factor) for factor in segment) or "1" for segment in dim]
    return f"({' | '.join(segments)})"


def local_size(dim: Dim, mesh: Mesh) -> int:
    """The size of each rank's part of a dim. Raises LayoutError if a factor does not divide."""
    return sum(math.prod(_local_factor(factor, mesh) for factor in segment) for segment in dim)


def _local_factor(factor: Factor, mesh: Mesh) -> int:
    if not factor.axes:
        return factor.size
    check_factor(factor, mesh)
    return factor.size // mesh.size(factor.axes)


def check_factor(factor: Factor, mesh: Mesh) -> None:
    """Raise LayoutError unless the factor's axes are in `mesh` and divide its size."""
    for axis in factor.axes:
        check_axis(axis, mesh, str(factor))
    ranks = mesh.size(factor.axes)
    if factor.size % ranks:
        below = factor.size - factor.size % ranks
        sizes = [str(size) for size in (below, below + ranks) if size]
        raise LayoutError(
            f"`{factor}` does not divide: {factor.size} over {ranks} ranks",
            code="does-not-divide",
            help=f"use a size that {ranks} divides, such as {' or '.join(sizes)}",
        )


def check_axis(axis: str, mesh: Mesh, culprit: str) -> None:
    """Raise LayoutError unless `mesh` has the axis that `culprit` names."""
    if axis not in mesh.names:
        raise LayoutError(
            f"`{culprit}` names axis `{axis}`, which the mesh ({mesh}) does not have",
            code="unknown-axis",
            help=f"name one of {', '.join(f'`{name}`' for name in mesh.names)}",
        )
