"""The collectives that Gloo and NCCL have themselves, and that both are asked for alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, ReduceOp, ReduceOptions

from meshwright.compiler.layout.wires import Wire

Begun = tuple[list[Any], Callable[[], Tensor]]
"""What to wait for, and the function that then gives the result, after another round if need be."""
REDUCE_OPS: dict[str, Any] = {"sum": ReduceOp.SUM, "max": ReduceOp.MAX, "min": ReduceOp.MIN}


class Group(Protocol):
    """A group of processes: its backend, its size and the place of this process in it."""

    backend: Any
    size: int
    position: int


def all_reduce(group: Group, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    """Reduce over the group, in the operand itself if it is donated."""
    options = AllreduceOptions()
    options.reduceOp = REDUCE_OPS[wire.reduce]
    result = tensor if donate else tensor.clone()
    return [group.backend.allreduce([result], options)], lambda: result


def all_gather(group: Group, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    """Gather the operands of all members along a new first dim."""
    whole = tensor.new_empty((group.size, *tensor.shape))
    return [group.backend._allgather_base(whole.view(-1), tensor.view(-1))], lambda: whole


def broadcast(group: Group, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    """Give every member the operand of the root."""
    options = BroadcastOptions()
    options.rootRank = wire.root
    result = tensor.clone()
    return [group.backend.broadcast([result], options)], lambda: result


def reduce(group: Group, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    """Reduce at the root; the other members get zeros."""
    options = ReduceOptions()
    options.reduceOp, options.rootRank = REDUCE_OPS[wire.reduce], wire.root
    result = tensor.clone()
    works = [group.backend.reduce([result], options)]
    return works, lambda: result if group.position == wire.root else result.zero_()


def transfer(group: Group, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    """Send the operand to the second member, or receive into it, as bytes: NCCL has no complex
    numbers."""
    flat = tensor.view(-1).view(torch.uint8)
    move = group.backend.recv if group.position else group.backend.send
    return [move([flat], 1 - group.position, 0)], lambda: tensor
