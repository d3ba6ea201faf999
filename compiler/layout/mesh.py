"""The device mesh: a named grid of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Mesh:
    """The grid of ranks: named axes with their sizes, the first varying slowest over the ranks.

    `axes` are (name, size) pairs. The coordinates of an axis in `sequential` are not ranks: each
    rank runs through them one after the other. Layouts treat it like any other axis.
    """

    axes: tuple[tuple[str, int], ...]
    sequential: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, in order."""
        return tuple(name for name, _ in self.axes)

    @property
    def of_ranks(self) -> Mesh:
        """The mesh without its sequential axes: what transports, checkpoints and users see."""
        return Mesh(_rank_axes(self)) if self.sequential else self

    @property
    def turns(self) -> tuple[dict[str, int], ...]:
        """The coordinates along the sequential axes, in the order in which ranks take them."""
        names = [name for name in self.names if name in self.sequential]
        places = itertools.product(*(range(self.size(name)) for name in names))
        return tuple(dict(zip(names, place, strict=True)) for place in places)

    @property
    def num_ranks(self) -> int:
        """The product of the sizes of all axes that are not sequential."""
        return math.prod(size for _, size in _rank_axes(self))

    def size(self, axes: str | Iterable[str]) -> int:
        """The number of coordinates along `axes`: one name, or multiple names taken together."""
        if isinstance(axes, str):
            axes = (axes,)
        return math.prod(_sizes(self)[axis] for axis in axes)

    def coords(self, rank: int) -> dict[str, int]:
        """The coordinates of `rank` on the axes that are not sequential: `{"dp": 0, "tp": 1}`."""
        axes = _rank_axes(self)
        found: dict[str, int] = {}
        for name, size in reversed(axes):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name, _ in axes}

    def rank(self, coords: Mapping[str, int]) -> int:
        """The rank at `coords`."""
        number = 0
        for name, size in _rank_axes(self):
            number = number * size + coords[name]
        return number

    def group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axes`, the first axis varying slowest."""
        return _group(self, rank, axes)

    def groups(self, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Every group over `axes`, by its first rank."""
        return _groups(self, axes)

    def position(self, coords: Mapping[str, int], axes: Iterable[str]) -> int:
        """The place of `coords` within its group over `axes`."""
        number = 0
        for axis in axes:
            number = number * self.size(axis) + coords[axis]
        return number

    def __str__(self) -> str:
        return ", ".join(
            f"{name}={size}" + (" (sequential)" if name in self.sequential else "")
            for name, size in self.axes
        )


def within(coords: Mapping[str, int], places: Mapping[str, Sequence[int]]) -> bool:
    """Whether coordinates are among `places` along each axis that has some."""
    return all(coords[axis] in among for axis, among in places.items())


@lru_cache(maxsize=256)
def _rank_axes(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    return tuple(axis for axis in mesh.axes if axis[0] not in mesh.sequential)


@lru_cache(maxsize=256)
def _sizes(mesh: Mesh) -> dict[str, int]:
    return dict(mesh.axes)


@lru_cache(maxsize=4096)
def _group(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
    here = mesh.coords(rank)
    axes = tuple(axis for axis in axes if axis in here)
    return tuple(
        mesh.rank({**here, **dict(zip(axes, place, strict=True))})
        for place in itertools.product(*(range(mesh.size(axis)) for axis in axes))
    )


@lru_cache(maxsize=256)
def _groups(mesh: Mesh, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(sorted({mesh.group(rank, axes) for rank in range(mesh.num_ranks)}))
