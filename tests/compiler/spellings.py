"""Every small layout, for tests that try all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from meshwright.compiler.layout.factors import Dim, Factor, Segment
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh

SQUARE = Mesh((("a", 2), ("b", 2)))
OBLONG = Mesh((("a", 2), ("b", 3)))


def factorizations(size: int, *, ones: bool = False) -> Iterator[tuple[int, ...]]:
    """Every ordered product of numbers above 1 that is `size`; `ones` adds single ones to them."""
    yield (size,)
    for first in range(1 if ones else 2, size):
        if size % first == 0 and (first > 1 or ones):
            yield from ((first, *rest) for rest in factorizations(size // first))


def segments(size: int, axes: Sequence[str], mesh: Mesh) -> Iterator[Segment]:
    """Every product of factors of `size`, each axis at most once, where it divides."""
    for sizes in factorizations(size, ones=True):
        yield from _placed(sizes, tuple(axes), mesh)


def _placed(sizes: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> Iterator[Segment]:
    if not sizes:
        yield ()
        return
    for count in range(len(axes) + 1):
        for chosen in itertools.permutations(axes, count):
            if sizes[0] % math.prod(mesh.size(axis) for axis in chosen) == 0:
                left = tuple(axis for axis in axes if axis not in chosen)
                for rest in _placed(sizes[1:], left, mesh):
                    yield (Factor(sizes[0], chosen), *rest)


def dims(size: int, axes: Sequence[str], mesh: Mesh, num_segments: int = 1) -> Iterator[Dim]:
    """Every dim of `size` with at most `num_segments` segments."""
    for segment in segments(size, axes, mesh):
        yield (segment,)
    if num_segments > 1:
        for first in range(1, size):
            for segment in segments(first, axes, mesh):
                for rest in dims(size - first, axes, mesh, num_segments - 1):
                    yield (segment, *rest)


def distinct(spellings: Iterator[Dim], mesh: Mesh) -> list[Dim]:
    """One spelling for each dim that is really another."""
    return list(dict.fromkeys(Layout((dim,)).canonical(mesh).dims[0] for dim in spellings))


def states(layout: Layout, mesh: Mesh) -> Iterator[Layout]:
    """The layout with each axis that does not split it replicated, partial or varying."""
    free = [axis for axis in mesh.names if axis not in layout.split_axes]
    for choice in itertools.product("rpv", repeat=len(free)):
        chosen = list(zip(free, choice, strict=True))
        yield layout.add_partial(axis for axis, state in chosen if state == "p").add_varying(
            axis for axis, state in chosen if state == "v"
        )
