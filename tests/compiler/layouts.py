"""Layouts made by hand, and global tensors of what ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from meshwright.compiler.layout.factors import Dim, Factor, cut
from meshwright.compiler.layout.layout import Layout, block_map
from meshwright.compiler.layout.mesh import Mesh


def product(*factors: Factor) -> Dim:
    """A dim that is one product of factors, major to minor."""
    return (factors,)


def split(shape: Iterable[int], axes: Mapping[int, str | tuple[str, ...]]) -> Layout:
    """Dim i of `shape` in equal blocks over `axes[i]`; a negative i counts from the end."""
    sizes = tuple(shape)
    by_dim: dict[int, tuple[str, ...]] = {}
    for dim, names in axes.items():
        by_dim[dim % len(sizes)] = (names,) if isinstance(names, str) else tuple(names)
    return Layout(tuple(cut(size, *by_dim.get(i, ())) for i, size in enumerate(sizes)))


def unshard(locals_by_rank: Sequence[Tensor], layout: Layout, mesh: Mesh) -> Tensor:
    """The global tensor of what the ranks hold, in rank order; pending reductions are applied.

    Where the value is replicated or varying the first coordinate's copy is taken.
    """
    whole = locals_by_rank[0].new_empty(layout.shape)
    for rank in range(mesh.num_ranks):
        coords = mesh.coords(rank)
        if any(place and axis not in layout.split_axes for axis, place in coords.items()):
            continue
        pending = mesh.group(rank, layout.partial_axes)
        held = combine([locals_by_rank[each] for each in pending], layout.reduction)
        whole.view(-1)[block_map(layout, mesh, coords).reshape(-1)] = held.reshape(-1)
    return whole


def combine(tensors: Sequence[Tensor], reduce: str) -> Tensor:
    """The elementwise "sum", "max" or "min" of tensors of one shape."""
    if len(tensors) == 1:
        return tensors[0]
    stacked = torch.stack(tuple(tensors))
    if reduce == "sum":
        return stacked.sum(0, dtype=stacked.dtype)
    return stacked.amax(0) if reduce == "max" else stacked.amin(0)
