"""Whether the rows that came to ranks by count had room, which a plan limits by `maximum`.

A rank that has no room for all of them takes as many as fit and goes on, so that the step ends on
every rank and none waits. Then all of them compare what they needed, and raise the same error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.public import Program
from meshwright.runtime.errors import OverfullError
from meshwright.runtime.rank import RankProgram, RankState


@dataclass(frozen=True)
class Counted:
    """An exchange of counted rows: what a rank has `room` for, and how many come to each where they
    are spread evenly."""

    node: Node
    room: int
    even: int


def counted_exchanges(program: Program) -> dict[int, Counted]:
    """The exchanges of counted rows of a program, by their numbers among its collectives."""
    mesh = program.stages[0].forward.mesh  # with the axis of microbatches
    found: dict[int, Counted] = {}
    for exchange in (exchange for each in program.instructions for exchange in each.exchanges):
        if exchange.counts:
            sent, node = exchange.node.args[0], exchange.node
            rows = [each.placed.local_shape(mesh)[0] for each in (node, sent)]
            found[exchange.wire.index] = Counted(node, *rows)
    return found


def check_room(state: RankState, exchanges: Mapping[int, Counted]) -> RankProgram:
    """Raise `OverfullError` on every rank if rows had no room on any, for the first exchange."""
    if not exchanges:
        return
    own = [state.room.needed.get(number, 0) for number in exchanges]
    numbers = torch.tensor(own, device=state.device)
    most = (yield Wire("all_reduce", state.mesh.names, "max"), numbers).tolist()
    for exchange, needed in zip(exchanges.values(), most, strict=True):
        if needed > exchange.room:
            raise _overfull(exchange, needed, state)


def _overfull(exchange: Counted, needed: int, state: RankState) -> OverfullError:
    module, room, even = exchange.node.origin.module, exchange.room, exchange.even
    return OverfullError(
        f"{needed} rows of `{module}` go to the experts of one rank, which has room for {room}",
        peers=tuple(range(state.mesh.num_ranks)),
        where=(f"{even} go to each where they are spread evenly; nothing has changed",),
        help=f"write `maximum={math.ceil(100 * needed / even) / 100:g}` or more in the `experts` "
        f"statement of `{module}`; without `maximum` all of them have room",
    )
