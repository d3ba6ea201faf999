"""Gather global tensors from every rank's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from meshwright.compiler.layout.local_ops import apply_all
from meshwright.compiler.layout.reshard import collectives
from meshwright.compiler.program import Stored
from meshwright.runtime.rank import RankProgram, RankState


def gathered(local: Tensor, stored: Stored, state: RankState) -> RankProgram:
    """The global tensor, without padding and in memory of its own, from every rank's part."""
    own = local
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
    listed: Iterable[Stored],
    value: Callable[[RankState, Stored], Tensor | None],
    state: RankState,
) -> RankProgram:
    """The global tensors by name, gathered one after the other; `value` gives a rank's part of one,
    or None where no rank has it."""
    found: dict[str, Tensor] = {}
    for stored in listed:
        local = value(state, stored)
        if local is not None:
            found[stored.name] = yield from gathered(local, stored, state)
    return found
