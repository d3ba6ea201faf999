"""Collectives over NCCL: its own, which choose their algorithms themselves, where it has one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllToAllOptions, ReduceScatterOptions, Store

from meshwright.compiler.layout.rows import Rows
from meshwright.compiler.layout.wires import WIRES, Wire, receive
from meshwright.runtime.transports import native
from meshwright.runtime.transports.native import Begun


class NcclGroup:
    """The processes of one group; `members` are ranks, in the order of the group."""

    def __init__(self, store: Store, members: tuple[int, ...], rank: int, timeout: float) -> None:
        # Only builds of torch with NCCL have this class.
        from torch.distributed import ProcessGroupNCCL

        self.members = members
        self.size, self.position = len(members), members.index(rank)
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout)
        self.backend: Any = ProcessGroupNCCL(store, self.position, self.size, options)

    def begin(self, wire: Wire, tensor: Any, started: bool, donate: bool) -> Begun:
        """Enqueue a collective; its wait makes the current stream wait, not the caller."""
        if WIRES[wire.kind].counted:
            return _rows(self, wire, tensor, donate)
        if not tensor.is_contiguous():
            tensor, donate = tensor.contiguous(), True
        return _NATIVE.get(wire.kind, _direct)(self, wire, tensor, donate)

    def abort(self) -> None:
        """End what is under way, so that a thread which waits for it returns with an error."""
        self.backend.abort()

    def close(self) -> None:
        """Wait for what is under way, then let go of the communicator."""
        self.backend.shutdown()
        del self.backend


def _reduce_scatter(group: NcclGroup, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    options = ReduceScatterOptions()
    options.reduceOp = native.REDUCE_OPS[wire.reduce]
    part = tensor.new_empty(tensor.shape[1:])
    work = group.backend._reduce_scatter_base(part.view(-1), tensor.view(-1), options)
    return [work], lambda: part


def _all_to_all(group: NcclGroup, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    whole = torch.empty_like(tensor)
    work = group.backend.alltoall_base(whole, tensor, [], [], AllToAllOptions())
    return [work], lambda: whole


def _direct(group: NcclGroup, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    """Send each operand straight to the members that need it, which works for any kind of wire.

    As an all_to_all of uneven parts, whose sends and receives are one NCCL group.
    """
    kind, place = WIRES[wire.kind], group.position
    others = [peer for peer in range(group.size) if peer != place]
    targets, sources = kind.peers(wire, place, others)
    parts = tensor.unbind(0) if kind.divided else [tensor] * group.size
    own = parts[place]
    given = [parts[peer].view(-1) for peer in targets]
    flat = given[0] if len(given) == 1 else torch.cat([own.new_empty(0), *given])
    received = own.new_empty((len(sources), *own.shape))
    taken = [own.numel() * (peer in sources) for peer in range(group.size)]
    sent = [own.numel() * (peer in targets) for peer in range(group.size)]
    work = group.backend.alltoall_base(received.view(-1), flat, taken, sent, AllToAllOptions())

    def finish() -> Tensor:
        held = [own] * group.size
        for peer, part in zip(sources, received.unbind(0), strict=True):
            held[peer] = part
        out = tensor if donate and not kind.divided else None
        return receive(wire, place, held, out, keep_others=False)

    return [work], finish


def _rows(group: NcclGroup, wire: Wire, given: Rows, donate: bool) -> Begun:
    """Send each member as many rows as there are for it: an all_to_all of uneven parts."""
    result, rows = given.taken()
    options = AllToAllOptions()
    work = group.backend.alltoall_base(rows, given.given(), given.received, given.sent, options)
    return [work], lambda: result


_NATIVE: dict[str, Callable[[NcclGroup, Wire, Tensor, bool], Begun]] = {
    "all_reduce": native.all_reduce,
    "all_gather": native.all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": native.broadcast,
    "reduce": native.reduce,
    "transfer": native.transfer,
}
