"""Layouts: which part of a global tensor each rank holds.

A dim is an ordered product of factors, major to minor, each split by mesh axes; or a concatenation
of such products, of which a rank holds its part of each. `3·12@tp·64` is a dim of 2304 whose middle
factor is split over `tp`. Underneath, a split is a `Cut`: axis `a` takes the digit with weight
`stride` in the index of the dim. A set of cuts is the same thing in every spelling, so that
equality, reshapes and changes of layout are all worked out on cuts (see `cuts.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.mesh import Mesh


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


@dataclass(frozen=True, slots=True)
class Layout:
    """One product of factors a dim, and the state of the axes that split no dim.

    `partial` holds (axis, "sum" | "max" | "min"): the value is that reduction over the axis.
    `varying` holds the axes over which the value is the same but each rank's use counts by itself.
    On every other axis the value is split, if a dim is cut by it, or replicated.
    Raises LayoutError for an axis used twice or pending reductions of two kinds.
    """

    dims: tuple[Dim, ...]
    partial: tuple[tuple[str, str], ...] = ()
    varying: tuple[str, ...] = ()
    # A layout is hashed and made canonical far more often than it is made.
    _hash: int = field(init=False, compare=False, repr=False)
    _canonical: tuple[Mesh, Layout] | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.dims, self.partial, self.varying)))
        object.__setattr__(self, "_canonical", None)
        _check_axes(self)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # String hashes, and so the one kept here, differ between processes.
        return Layout, (self.dims, self.partial, self.varying)

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape."""
        return tuple(dim_size(dim) for dim in self.dims)

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """What each rank holds. Raises LayoutError if a factor does not divide."""
        return tuple(_local_size(dim, mesh) for dim in self.dims)

    def canonical(self, mesh: Mesh) -> Layout:
        """The one spelling of this layout on `mesh`: equal layouts have equal canonical forms.

        Raises LayoutError for an axis that `mesh` lacks or a factor that does not divide.
        """
        kept = self._canonical
        if kept is not None and (kept[0] is mesh or kept[0] == mesh):
            return kept[1]
        # Imported here: cuts are made of layouts' factors.
        from meshwright.compiler.cuts import canonical_layout

        found = canonical_layout(self, mesh)
        object.__setattr__(found, "_canonical", (mesh, found))
        object.__setattr__(self, "_canonical", (mesh, found))
        return found

    def equals(self, other: Layout, mesh: Mesh) -> bool:
        """Whether every rank of `mesh` holds the same under both."""
        return self is other or self.canonical(mesh) == other.canonical(mesh)

    @property
    def split_axes(self) -> tuple[str, ...]:
        """The axes that cut a dim, in the order of the dims."""
        return tuple(dict.fromkeys(axis for dim in self.dims for axis in dim_axes(dim)))

    @property
    def partial_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.partial)

    @property
    def reduction(self) -> str:
        """How pending values combine: "sum", also when none is pending, "max" or "min"."""
        return self.partial[0][1] if self.partial else "sum"

    @property
    def axes_used(self) -> tuple[str, ...]:
        """The axes on which the value is not replicated."""
        return (*self.split_axes, *self.partial_axes, *self.varying)

    def state(self, axis: str) -> str:
        """`replicated`, `split`, `partial` or `varying`."""
        if axis in self.varying:
            return "varying"
        if axis in self.partial_axes:
            return "partial"
        return "split" if axis in self.split_axes else "replicated"

    def split_dim(self, axis: str) -> int | None:
        """The dim that `axis` cuts, if any."""
        return next((i for i, dim in enumerate(self.dims) if axis in dim_axes(dim)), None)

    def dual(self) -> Layout:
        """The layout of the value's cotangent: partial sums and varying change places.

        Raises LayoutError for a pending max or min, which has no linear adjoint.
        """
        if self.partial and self.reduction != "sum":
            raise LayoutError(
                f"a pending {self.reduction} has no cotangent",
                code="not-differentiable",
                culprit=str(self),
                help="reduce it first, or detach it",
            )
        if not self.partial and not self.varying:
            return self
        pending = tuple((axis, "sum") for axis in self.varying)
        return Layout(self.dims, pending, self.partial_axes)

    def add_partial(self, axes: Iterable[str], reduce: str = "sum") -> Layout:
        """Also pending over `axes`."""
        added = dict.fromkeys(axes, reduce)
        return replace(self, partial=tuple(sorted({**dict(self.partial), **added}.items())))

    def drop_partial(self, axes: Iterable[str] | None = None) -> Layout:
        """Replicated where it was pending, over `axes` or everywhere."""
        gone = self.partial_axes if axes is None else set(axes)
        return replace(self, partial=tuple(item for item in self.partial if item[0] not in gone))

    def add_varying(self, axes: Iterable[str]) -> Layout:
        """Also varying over `axes`."""
        return replace(self, varying=tuple(sorted({*self.varying, *axes})))

    def drop_varying(self, axes: Iterable[str] | None = None) -> Layout:
        """Replicated where it was varying, over `axes` or everywhere."""
        gone = self.varying if axes is None else set(axes)
        return replace(self, varying=tuple(axis for axis in self.varying if axis not in gone))

    def drop_states(self) -> Layout:
        """Only the dims."""
        return Layout(self.dims) if self.partial or self.varying else self

    def drop_split(self, axes: Iterable[str], mesh: Mesh) -> Layout:
        """Replicated over those of `axes` that cut a dim; the other cuts stay where they are."""
        from meshwright.compiler.cuts import without_axes

        return without_axes(self, frozenset(axes), mesh)

    def with_dims(self, dims: Iterable[Dim]) -> Layout:
        """Other dims, the same partial and varying axes."""
        return Layout(tuple(dims), self.partial, self.varying)

    def __str__(self) -> str:
        text = f"[{', '.join(format_dim(dim) for dim in self.dims)}]"
        if self.partial:
            word = "" if self.reduction == "sum" else f"{self.reduction} over "
            text += f" partial({word}{', '.join(self.partial_axes)})"
        if self.varying:
            text += f" varying({', '.join(self.varying)})"
        return text


def whole(size: int) -> Dim:
    """A dim that nothing cuts."""
    return ((Factor(size),),)


def cut(size: int, *axes: str) -> Dim:
    """A dim in equal blocks over `axes`, the first of which is the major one."""
    return ((Factor(size, axes),),)


def product(*factors: Factor) -> Dim:
    """A dim that is one product of factors, major to minor."""
    return (factors,)


def concatenation(*segments: Segment) -> Dim:
    """A dim of segments one after the other; a rank holds its part of each."""
    return segments


def replicated(shape: Iterable[int]) -> Layout:
    """The whole tensor on every rank."""
    return Layout(tuple(whole(size) for size in shape))


def split(shape: Iterable[int], axes: Mapping[int, str | tuple[str, ...]]) -> Layout:
    """Dim i of `shape` in equal blocks over `axes[i]`; a negative i counts from the end."""
    sizes = tuple(shape)
    by_dim: dict[int, tuple[str, ...]] = {}
    for dim, names in axes.items():
        by_dim[dim % len(sizes)] = (names,) if isinstance(names, str) else tuple(names)
    return Layout(tuple(cut(size, *by_dim.get(i, ())) for i, size in enumerate(sizes)))


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


def _local_size(dim: Dim, mesh: Mesh) -> int:
    return sum(math.prod(_local_factor(factor, mesh) for factor in segment) for segment in dim)


def _local_factor(factor: Factor, mesh: Mesh) -> int:
    if not factor.axes:
        return factor.size
    check_factor(factor, mesh)
    return factor.size // mesh.size(factor.axes)


def check_factor(factor: Factor, mesh: Mesh) -> None:
    """Raises LayoutError unless the factor's axes are in `mesh` and divide its size."""
    unknown = [axis for axis in factor.axes if axis not in mesh.names]
    if unknown:
        raise LayoutError(
            f"`{factor}` names axis `{unknown[0]}`, which the mesh ({mesh}) does not have",
            code="unknown-axis",
            help=f"name one of {', '.join(f'`{name}`' for name in mesh.names)}",
        )
    ranks = mesh.size(factor.axes)
    if factor.size % ranks:
        below = factor.size - factor.size % ranks
        sizes = [str(size) for size in (below, below + ranks) if size]
        raise LayoutError(
            f"`{factor}` does not divide: {factor.size} over {ranks} ranks",
            code="does-not-divide",
            help=f"use a size that {ranks} divides, such as {' or '.join(sizes)}",
        )


def _check_axes(layout: Layout) -> None:
    """Each axis once over dims, partial and varying; segments of one dim may share axes."""
    used: list[str] = [*layout.partial_axes, *layout.varying]
    for dim in layout.dims:
        if len(dim) == 1:
            for factor in dim[0]:
                used += factor.axes
            continue
        for segment in dim:
            _check_once([axis for factor in segment for axis in factor.axes], layout)
        used += dim_axes(dim)
    if used:
        _check_once(used, layout)
    if len({reduce for _, reduce in layout.partial}) > 1:
        raise LayoutError(
            "pending reductions of two kinds do not commute",
            code="mixed-reductions",
            culprit=str(layout.partial),
            help="reduce over one of the axes first",
        )


def _check_once(axes: list[str], layout: Layout) -> None:
    if len(axes) == len(set(axes)):
        return
    twice = next(axis for axis in axes if axes.count(axis) > 1)
    raise LayoutError(
        f"axis `{twice}` is used twice in `{layout}`",
        code="axis-twice",
        help=f"split one dim by `{twice}`, or name another axis for the second",
    )
