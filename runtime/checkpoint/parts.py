"""Parts of tensors: which rank owns one, what it holds, and how one plan's parts fill another's.

A layout splits each dim by itself, so a part is the outer product of index lists, one per dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meshwright.compiler.layout.extents import Padding, held_indices
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh, within
from meshwright.compiler.program import Stored
from meshwright.dsl.errors import plural
from meshwright.runtime.checkpoint.files import COPY_AGAIN
from meshwright.runtime.checkpoint.header import dtype_of
from meshwright.runtime.checkpoint.manifest import MANIFEST, Manifest, SavedTensor
from meshwright.runtime.checkpoint.shards import Shards
from meshwright.runtime.errors import RunError
from meshwright.runtime.rank import RankState
from meshwright.runtime.state.weights import check_lossless


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a checkpoint and what this rank holds of it: a meta tensor if that is nothing.

    `shape` is without padding, and `held_at` as in `Stored`.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    tensor: Tensor
    paddings: tuple[Padding, ...] = ()
    held_at: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def of(stored: Stored, tensor: Tensor, name: str = "") -> Entry:
        """A parameter or buffer, or something of its shape under another name."""
        return Entry(
            name or stored.name,
            stored.type.shape,
            stored.layout,
            tensor,
            stored.paddings,
            stored.held_at,
        )

    def owners(self, place: int, mesh: Mesh) -> tuple[int, ...]:
        """The rank that writes each part; ranks with copies take turns, by the entry's place."""
        found = []
        others = tuple(a for a in mesh.names if a not in self.layout.split_axes)
        for coords in part_coords(self.layout, mesh):
            copies = [
                rank
                for rank in mesh.group(mesh.rank(coords), others)
                if within(mesh.coords(rank), self.held_at)
            ]
            found.append(copies[place % len(copies)])
        return tuple(found)


def saved_tensors(entries: Sequence[Entry], mesh: Mesh) -> dict[str, SavedTensor]:
    """What a manifest says of the tensors that the ranks of `mesh` save."""
    return {
        entry.name: SavedTensor(
            entry.shape,
            str(entry.tensor.dtype).removeprefix("torch."),
            entry.layout,
            entry.owners(place, mesh),
            entry.paddings,
        )
        for place, entry in enumerate(entries)
    }


def part_coords(layout: Layout, mesh: Mesh) -> Iterator[dict[str, int]]:
    """The coordinates of the first rank that holds each part, the mesh's first axis major."""
    axes = [axis for axis in mesh.names if axis in layout.split_axes]
    origin = dict.fromkeys(mesh.names, 0)
    for place in itertools.product(*(range(mesh.size(axis)) for axis in axes)):
        yield {**origin, **dict(zip(axes, place, strict=True))}


def indices(saved: Entry | SavedTensor, mesh: Mesh, coords: Mapping[str, int]) -> list[Tensor]:
    """For each dim, the global indices of the entries that the rank at `coords` holds: -1 for one
    that storage adds."""
    return held_indices(saved.shape, saved.layout, saved.paddings, mesh, coords)


def saved_parts(saved: SavedTensor, mesh: Mesh) -> Iterator[tuple[int, list[Tensor]]]:
    """The rank that wrote each part, and for each dim the global indices that it has."""
    for owner, coords in zip(saved.owners, part_coords(saved.layout, mesh), strict=True):
        yield owner, [index[index >= 0] for index in indices(saved, mesh, coords)]


def own_parts(entries: Sequence[Entry], state: RankState) -> dict[str, Tensor]:
    """The parts that this rank owns and writes, without padding."""
    found: dict[str, Tensor] = {}
    for place, entry in enumerate(entries):
        if state.rank in entry.owners(place, state.mesh):
            found[entry.name] = _true_entries(entry, state)
    return found


def _true_entries(entry: Entry, state: RankState) -> Tensor:
    tensor = entry.tensor.detach()
    if not entry.paddings:
        return tensor
    for dim, index in enumerate(indices(entry, state.mesh, state.coords)):
        if (index < 0).any():
            kept = (index >= 0).nonzero().squeeze(1)
            tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def read_into(
    entry: Entry, name: str, manifest: Manifest, shards: Shards, state: RankState
) -> None:
    """Fill what this rank holds of `entry` from the parts of the tensor saved as `name`."""
    wanted = indices(entry, state.mesh, state.coords)
    _fill(entry.tensor.detach(), wanted, name, manifest, shards)


def read_whole(name: str, manifest: Manifest, shards: Shards) -> Tensor:
    """The global tensor saved as `name`."""
    saved = manifest.tensors[name]
    check_size(name, manifest, shards)
    found = torch.zeros(saved.shape, dtype=dtype_of(saved.dtype))
    _fill(found, [torch.arange(size) for size in saved.shape], name, manifest, shards)
    return found


def check_size(name: str, manifest: Manifest, shards: Shards) -> int:
    """The elements of all parts of a tensor, of which there are more where parts share some.

    Raises `RunError` where there are fewer than the tensor has: without this, a manifest could ask
    for any amount of memory.
    """
    saved = manifest.tensors[name]
    held = sum(math.prod(shards.held(owner, name).shape) for owner in saved.owners)
    if held < math.prod(saved.shape):
        raise RunError(
            f"`{name}` is {list(saved.shape)} in `{shards.folder / MANIFEST}`, and the files have "
            f"{plural(held, 'element')} of it",
            help=COPY_AGAIN,
        )
    return held


def _fill(
    target: Tensor, wanted: Sequence[Tensor], name: str, manifest: Manifest, shards: Shards
) -> None:
    """Fill `target`, which holds the global indices `wanted`, from every part that has some.

    It may have another floating-point type; raises `RunError` where that cannot hold a value.
    """
    saved = manifest.tensors[name]
    for owner, given in saved_parts(saved, manifest.mesh):
        places = [_common(w, g) for w, g in zip(wanted, given, strict=True)]
        if all(len(mine) for mine, _ in places):
            shape = tuple(len(index) for index in given)
            needed = [theirs for _, theirs in places]
            part = shards.part(owner, name, shape, dtype_of(saved.dtype), needed)
            part = taken(part, needed)
            where = f"the checkpoint `{shards.folder}` does not fit the types of this run"
            check_lossless([(name, part, target.dtype)], where)
            _copy(target, part, [mine for mine, _ in places])


def taken(whole: Tensor, wanted: Sequence[Tensor]) -> Tensor:
    """The elements of a tensor at these indices of each dim."""
    for dim, index in enumerate(wanted):
        if len(index) == whole.shape[dim]:
            continue
        if len(index) and _consecutive(index):
            whole = whole.narrow(dim, int(index[0]), len(index))
        else:
            whole = whole.index_select(dim, index)
    return whole


def _common(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the indices that two sorted lists share, in the one and in the other."""
    if not len(given):
        return given, given
    places = torch.searchsorted(given, wanted).clamp(max=len(given) - 1)
    mine = (given[places] == wanted).nonzero().squeeze(1)
    return mine, places[mine]


def _copy(target: Tensor, part: Tensor, places: Sequence[Tensor]) -> None:
    """Write a part to these places of each dim."""
    for dim, mine in enumerate(places):
        if _consecutive(mine):
            target = target.narrow(dim, int(mine[0]), len(mine))
    if all(_consecutive(mine) for mine in places):
        target.copy_(part)
        return
    index = []
    for dim, mine in enumerate(places):
        own = torch.arange(len(mine)) if _consecutive(mine) else mine
        index.append(own.view(-1, *[1] * (part.dim() - dim - 1)).to(target.device))
    target[tuple(index)] = part.to(target.device, target.dtype)


def _consecutive(index: Tensor) -> bool:
    return int(index[-1]) - int(index[0]) == len(index) - 1
