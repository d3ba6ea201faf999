"""Whether the rows that came to ranks by count had room, which a plan limits by `maximum`.

A rank that has no room for all of them takes as many as fit and goes on, so that the step ends on
every rank and none waits. Then all of them compare what they needed, and raise the same error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.public import Program
from meshwright.runtime.errors import OverfullError
from meshwright.runtime.rank import RankProgram, RankState


def counted_exchanges(program: Program) -> dict[int, Node]:
    """The exchanges of counted rows of a program, by their numbers among its collectives."""
    exchanges = (exchange for each in program.instructions for exchange in each.exchanges)
    return {each.wire.index: each.node for each in exchanges if each.counts}


def check_room(state: RankState, exchanges: Mapping[int, Node]) -> RankProgram:
    """Raise `OverfullError` on every rank if rows had no room on any, for the first exchange."""
    if not exchanges:
        return
    own = [state.room.needed.get(number, 0) for number in exchanges]
    numbers = torch.tensor(own, device=state.device)
    most = (yield Wire("all_reduce", state.mesh.names, "max"), numbers).tolist()
    for node, needed in zip(exchanges.values(), most, strict=True):
        room = node.placed.local_shape(state.mesh)[0]
        if needed > room:
            raise _overfull(node, needed, room, state)


def _overfull(node: Node, needed: int, room: int, state: RankState) -> OverfullError:
    sent: Node = node.args[0]
    even = sent.placed.local_shape(state.mesh)[0]
    module = node.origin.module
    return OverfullError(
        f"{needed} rows of `{module}` go to the experts of one rank, which has room for {room}",
        peers=tuple(range(state.mesh.num_ranks)),
        where=(f"{even} go to each where they are spread evenly; nothing has changed",),
        help=f"write `maximum={math.ceil(100 * needed / even) / 100:g}` or more in the `experts` "
        f"statement of `{module}`; without `maximum` all of them have room",
    )
