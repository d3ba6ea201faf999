"""Layouts: which part of a global tensor each rank holds.

A dim is an ordered product of factors, major to minor, each split by mesh axes; or a concatenation
of such products, where a rank holds its part of each. `3·12@tp·64` is a dim of 2304 whose middle
factor is split over `tp`. Underneath, a split is a `Cut`: axis `a` takes the digit with weight
`stride` in the index of the dim. The set of cuts does not depend on the spelling, so equality,
reshapes and changes of layout are all computed on cuts (see `cuts.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.cuts import Interval, Intervals, dim_of, intervals_of
from meshwright.compiler.layout.factors import (
    Dim,
    check_axis,
    dim_axes,
    dim_size,
    format_dim,
    local_size,
    whole,
)
from meshwright.compiler.layout.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Layout:
    """One product of factors per dim, and the state of the axes that split no dim.

    `partial` holds (axis, "sum" | "max" | "min"): the value is that reduction over the axis.
    `varying` holds the axes over which the value is the same but each rank's use counts separately.
    On every other axis the value is split, if the axis cuts a dim, or replicated.
    Raises LayoutError for an axis used twice or pending reductions of two kinds.
    """

    dims: tuple[Dim, ...]
    partial: tuple[tuple[str, str], ...] = ()
    varying: tuple[str, ...] = ()
    # A layout is measured, hashed and made canonical far more often than it is made.
    shape: tuple[int, ...] = field(init=False, compare=False, repr=False)
    """The global shape."""
    _hash: int = field(init=False, compare=False, repr=False)
    _canonical: tuple[Mesh, Layout] | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(map(dim_size, self.dims)))
        object.__setattr__(self, "_hash", hash((self.dims, self.partial, self.varying)))
        object.__setattr__(self, "_canonical", None)
        _check_axes(self)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # String hashes, and so the one kept here, differ between processes.
        return Layout, (self.dims, self.partial, self.varying)

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """The shape of each rank's part. Raises LayoutError if a factor does not divide."""
        return tuple(local_size(dim, mesh) for dim in self.dims)

    def canonical(self, mesh: Mesh) -> Layout:
        """The one spelling of this layout on `mesh`: equal layouts have equal canonical forms.

        Raises LayoutError for an axis that `mesh` lacks or a factor that does not divide.
        """
        kept = self._canonical
        if kept is not None and (kept[0] is mesh or kept[0] == mesh):
            return kept[1]
        found = _canonical(self, mesh)
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
        """This layout, also pending over `axes`."""
        pending = dict(self.partial) | dict.fromkeys(axes, reduce)
        return replace(self, partial=tuple(sorted(pending.items())))

    def drop_partial(self, axes: Iterable[str] | None = None) -> Layout:
        """This layout, replicated where it was pending, over `axes` or everywhere."""
        gone = self.partial_axes if axes is None else set(axes)
        return replace(self, partial=tuple(item for item in self.partial if item[0] not in gone))

    def add_varying(self, axes: Iterable[str]) -> Layout:
        """This layout, also varying over `axes`."""
        return replace(self, varying=tuple(sorted({*self.varying, *axes})))

    def drop_varying(self, axes: Iterable[str] | None = None) -> Layout:
        """This layout, replicated where it was varying, over `axes` or everywhere."""
        gone = self.varying if axes is None else set(axes)
        return replace(self, varying=tuple(axis for axis in self.varying if axis not in gone))

    def drop_states(self) -> Layout:
        """The dims of this layout, neither partial nor varying."""
        return Layout(self.dims) if self.partial or self.varying else self

    def drop_split(self, axes: Iterable[str], mesh: Mesh) -> Layout:
        """This layout without the cuts by `axes`."""
        gone = frozenset(axes)
        intervals = (intervals_of(dim, mesh) for dim in self.dims)
        return self.with_dims(
            dim_of(interval.without(gone) for interval in dim) for dim in intervals
        )

    def with_dims(self, dims: Iterable[Dim]) -> Layout:
        """A layout of other dims, with the same partial and varying axes."""
        return Layout(tuple(dims), self.partial, self.varying)

    def __repr__(self) -> str:
        return f"<Layout {self}>"

    def __str__(self) -> str:
        text = f"[{', '.join(format_dim(dim) for dim in self.dims)}]"
        if self.partial:
            word = "" if self.reduction == "sum" else f"{self.reduction} over "
            text += f" partial({word}{', '.join(self.partial_axes)})"
        if self.varying:
            text += f" varying({', '.join(self.varying)})"
        return text


def replicated(shape: Iterable[int]) -> Layout:
    """The whole tensor on every rank."""
    return Layout(tuple(whole(size) for size in shape))


def _canonical(layout: Layout, mesh: Mesh) -> Layout:
    dims = tuple(dim_of(intervals_of(dim, mesh)) for dim in layout.dims)
    sizes = dict(mesh.axes)
    for axis in (*layout.partial_axes, *layout.varying):
        check_axis(axis, mesh, str(layout))
    partial = tuple(sorted(item for item in layout.partial if sizes[item[0]] > 1))
    varying = tuple(sorted(axis for axis in layout.varying if sizes[axis] > 1))
    same = dims == layout.dims and partial == layout.partial and varying == layout.varying
    return layout if same else Layout(dims, partial, varying)


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
        pending = ", ".join(f"{reduce} over {axis}" for axis, reduce in layout.partial)
        raise LayoutError(
            "pending reductions of two kinds do not commute",
            code="mixed-reductions",
            culprit=f"partial({pending})",
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


def shard(tensor: Tensor, layout: Layout, mesh: Mesh, coords: Mapping[str, int]) -> Tensor:
    """The part of a global tensor that the rank at `coords` holds: a view wherever possible.

    The first coordinate of a pending sum holds the value and the others hold zeros; every
    coordinate of a pending max or min holds the value.
    """
    for dim, spelling in enumerate(layout.dims):
        intervals = intervals_of(spelling, mesh)
        if len(intervals) == 1:
            tensor = _own(tensor, dim, intervals[0], coords)
        else:
            pieces = torch.split_with_sizes(
                tensor, [interval.length for interval in intervals], dim
            )
            own = (
                _own(piece, dim, interval, coords)
                for piece, interval in zip(pieces, intervals, strict=True)
            )
            tensor = torch.cat(tuple(own), dim)
    pending = layout.partial_axes if layout.reduction == "sum" else ()
    if any(coords[axis] for axis in pending):
        return torch.zeros_like(tensor)
    return tensor


def block_map(layout: Layout, mesh: Mesh, coords: Mapping[str, int]) -> Tensor:
    """The global flat index of each element that the rank at `coords` holds."""
    shape = layout.shape
    indices = torch.arange(math.prod(shape)).view(shape)
    return shard(indices, layout.drop_states(), mesh, coords)


def uniform_blocks(
    local: Tensor, layout: Layout, mesh: Mesh
) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """The blocks of what a rank holds, views of `local`, each with the axes that split it.

    Ranks that differ only on other axes hold copies of a block. There is more than one block only
    where the segments of a dim are split over different axes.
    """
    if all(len(dim) == 1 for dim in layout.dims):
        yield local, layout.split_axes
        return
    for grid in itertools.product(*(_local(intervals_of(dim, mesh)) for dim in layout.dims)):
        block = local
        for dim, (start, interval) in enumerate(grid):
            block = block.narrow(dim, start, interval.local_length)
        yield block, tuple({cut.axis: None for _, interval in grid for cut in interval.cuts})


def _own(tensor: Tensor, dim: int, interval: Interval, coords: Mapping[str, int]) -> Tensor:
    """The rank's part of a tensor along a dim that is one interval."""
    if not interval.cuts:
        return tensor
    held = _select(tensor, dim, interval, coords)
    return held.reshape(*tensor.shape[:dim], interval.local_length, *tensor.shape[dim + 1 :])


def _select(tensor: Tensor, dim: int, interval: Interval, coords: Mapping[str, int]) -> Tensor:
    """The rank's part as a view, with the dim unflattened into what lies between the cuts."""
    digits = interval.digits()
    view = _unflatten(tensor, dim, [size for size, _ in digits])
    place = dim
    for _, axis in digits:
        if axis is None:
            place += 1
        else:
            view = view.select(place, coords[axis])
    return view


def _unflatten(tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """The tensor with `dim` unflattened, always a view (torch's `unflatten` refuses no sizes)."""
    return tensor.view((*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :]))


def _local(intervals: Intervals) -> Iterator[tuple[int, Interval]]:
    """Each interval with its first index on a rank."""
    starts = itertools.accumulate((each.local_length for each in intervals), initial=0)
    return zip(starts, intervals, strict=False)
