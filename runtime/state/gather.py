"""Gather global tensors from the parts that ranks hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meshwright.compiler.layout.local_ops import apply_all
from meshwright.compiler.layout.reshard import collectives
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.program import Stored
from meshwright.runtime.rank import RankProgram, RankState

_TYPES = sorted((each for each in vars(torch).values() if isinstance(each, torch.dtype)), key=str)


def gathered(local: Tensor, stored: Stored, state: RankState) -> RankProgram:
    """The global tensor, without padding and in memory of its own, from the part of every rank."""
    own = local
    local = local.to(state.device)
    whole = stored.layout.drop_split(stored.layout.split_axes, state.mesh)
    for collective in collectives(stored.layout, whole, state.mesh):
        transfer = collective.transfer(state.mesh)
        local = apply_all(transfer.before, local, state.coords, state.mesh)
        if transfer.wire is not None:
            local = yield transfer.wire, local.contiguous()
        local = apply_all(transfer.after, local, state.coords, state.mesh)
    local = stored.unpadded(local).reshape(stored.type.shape).contiguous()
    shared = local.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    return local.clone() if shared else local


def gathered_all(
    listed: Sequence[Stored],
    value: Callable[[RankState, Stored], Tensor | None],
    state: RankState,
) -> RankProgram:
    """The global tensors by name, gathered one after the other; `value` gives the part of one that
    a rank holds, or None where none of those that hold it has any."""
    state.follow_written()
    parts = [value(state, each) if each.held_by(state.coords) else None for each in listed]
    types = [None if part is None else part.dtype for part in parts]
    if len(state.holders) > 1:
        types = yield from _known_types(types, state)
    found: dict[str, Tensor] = {}
    for stored, local, dtype in zip(listed, parts, types, strict=True):
        if dtype is not None:
            part = yield from _handed(local, dtype, stored, state)
            found[stored.name] = yield from gathered(part, stored, state)
    return found


def _known_types(types: Sequence[torch.dtype | None], state: RankState) -> RankProgram:
    """The types of tensors on every rank, known to those that hold them."""
    places = [-1 if dtype is None else _TYPES.index(dtype) for dtype in types]
    own = torch.tensor(places, device=state.device)
    most = (yield Wire("all_reduce", state.mesh.names, "max"), own).tolist()
    return [None if place < 0 else _TYPES[place] for place in most]


def _handed(
    local: Tensor | None, dtype: torch.dtype, stored: Stored, state: RankState
) -> RankProgram:
    """A rank's part of a tensor: its own or, where it holds none, that of the first that does."""
    if not stored.held_at:
        return local
    if local is None:
        shape = stored.layout.local_shape(state.mesh)
        local = torch.empty(shape, dtype=dtype, device=state.device)
    axes = tuple(axis for axis in state.mesh.names if axis in stored.held_at)
    first = {axis: places[0] for axis, places in stored.held_at.items()}
    root = state.mesh.position(first, axes)
    return (yield Wire("broadcast", axes, root=root), local.to(state.device).contiguous())
