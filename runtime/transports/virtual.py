"""The virtual mesh: every rank's generator in this process, driven to its next yield in turn.

A collective happens when the last member of its group has asked for it. Members are matched by
order within the group, so ranks may be at different points of different programs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import WIRES, Start, Wire, everyone
from meshwright.runtime.errors import (
    CALL_SAME_METHODS,
    DeadlockError,
    MismatchError,
    RunError,
    spell_ranks,
    spell_wire,
    verb,
)
from meshwright.runtime.rank import RankProgram

_MOST_RANKS = 4096


class _Exchange:
    """One collective of one group: what its members have given so far."""

    __slots__ = ("first", "given", "handles", "members", "missing", "wire")

    def __init__(self, members: tuple[int, ...], wire: Wire, first: int) -> None:
        self.members, self.wire, self.first = members, wire, first
        self.missing = len(members)
        self.given: list[Tensor | None] = [None] * len(members)
        self.handles: list[_Handle | None] = [None] * len(members)


@dataclass(eq=False, slots=True)
class _Handle:
    """A started collective of one rank; `result` is there once every member has given."""

    rank: int
    donated: bool
    exchange: _Exchange | None = None
    result: Tensor | None = None
    waited: bool = False


class _Group:
    """The ranks over a tuple of axes, and their collectives under way, by order."""

    __slots__ = ("counts", "exchanges", "members")

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.counts = [0] * len(members)
        self.exchanges: dict[int, _Exchange] = {}


class VirtualMesh:
    """Every rank of the mesh in this process."""

    has_every_rank = True

    def __init__(self, mesh: Mesh) -> None:
        if mesh.num_ranks > _MOST_RANKS:
            raise RunError(
                f"the mesh has {mesh.num_ranks} ranks, and one process runs at most {_MOST_RANKS}",
                help="start a process for each rank with `meshwright run` or torchrun",
            )
        self.mesh = mesh
        self.ranks: tuple[int, ...] = tuple(range(mesh.num_ranks))

    def __repr__(self) -> str:
        return f"<VirtualMesh {self.mesh}: {len(self.ranks)} ranks in this process>"

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """Drive all ranks to their ends."""
        return run_virtual(programs, self.mesh, names)

    def connect(self, wires: Iterable[Wire]) -> None:
        """There is nothing to connect."""

    def check_same_program(self, digest: str) -> None:
        """There is one program here."""

    def close(self, error: BaseException | None = None) -> None:
        """There is nothing to leave."""


def run_virtual(
    programs: Sequence[RankProgram], mesh: Mesh, names: Sequence[str] = ()
) -> list[Any]:
    """Run one generator per rank to its end, and return what each returned, by rank.

    `names[i]` is the node of the collective with index i, for errors. Raises `MismatchError` where
    the members of a group ask for different operations, `DeadlockError` where no rank can go on.
    An exception that a rank raises gets a note with the rank, unless it names its ranks.
    """
    assert len(programs) == mesh.num_ranks
    driver = _Driver(programs, mesh, names)
    try:
        return driver.run()
    finally:
        for program in programs:
            program.close()


class _Driver:
    def __init__(self, programs: Sequence[RankProgram], mesh: Mesh, names: Sequence[str]) -> None:
        self.programs, self.mesh, self.names = programs, mesh, names
        self.places: list[dict[tuple[object, ...], tuple[_Group, int]]] = [{} for _ in programs]
        self.inbox: list[Any] = [None] * len(programs)
        self.waiting: list[_Handle | None] = [None] * len(programs)
        self.ready = deque(range(len(programs)))
        self.results: list[Any] = [None] * len(programs)
        self.num_left = len(programs)

    def run(self) -> list[Any]:
        while self.ready:
            rank = self.ready.popleft()
            try:
                self.advance(rank, self.programs[rank].send)
            except StopIteration as stop:
                self.results[rank] = stop.value
                self.num_left -= 1
            except BaseException as error:
                if not (isinstance(error, RunError) and (error.peers or error.rank is not None)):
                    error.add_note(f"on rank {rank} of the virtual mesh ({self.spell_place(rank)})")
                raise
        if self.num_left:
            raise self.deadlock()
        return self.results

    def advance(self, rank: int, send: Any) -> None:
        """Drive one rank until it has to wait for another."""
        inbox = self.inbox
        while True:
            value, inbox[rank] = inbox[rank], None
            request = send(value)
            value = None
            if type(request) is tuple:
                handle = _Handle(rank, len(request) > 2 and request[2])
                self.give(handle, request[0], request[1])
            elif type(request) is Start:
                handle = inbox[rank] = _Handle(rank, request.donate)
                self.give(handle, request.wire, request.tensor)
                continue
            else:
                handle = request.handle
            request = None
            if handle.result is None:
                handle.waited = True
                self.waiting[rank] = handle
                return
            inbox[rank], handle.result = handle.result, None

    def give(self, handle: _Handle, wire: Wire, tensor: Tensor) -> None:
        """Post a rank's operand; the last of the group computes for all."""
        rank = handle.rank
        place = self.places[rank].get(wire.lane)
        group, position = place if place is not None else self.join(rank, wire)
        order = group.counts[position]
        group.counts[position] = order + 1
        exchange = group.exchanges.get(order)
        if exchange is None:
            exchange = group.exchanges[order] = _Exchange(group.members, wire, position)
            self.check_operand(rank, wire, tensor, len(group.members))
        else:
            self.check_same(exchange, rank, wire, tensor)
        handle.exchange = exchange
        exchange.given[position] = tensor
        exchange.handles[position] = handle
        exchange.missing -= 1
        if not exchange.missing:
            del group.exchanges[order]
            self.finish(exchange)

    def finish(self, exchange: _Exchange) -> None:
        given: list[Any] = exchange.given
        handles: list[Any] = exchange.handles
        results = everyone(exchange.wire, given, [handle.donated for handle in handles])
        exchange.given = []
        for handle, result in zip(handles, results, strict=True):
            handle.exchange = None
            if handle.waited:
                self.inbox[handle.rank] = result
                self.waiting[handle.rank] = None
                self.ready.append(handle.rank)
            else:
                handle.result = result
        exchange.handles = []

    def join(self, rank: int, wire: Wire) -> tuple[_Group, int]:
        """Make the group of `rank` that runs `wire` known to each of its members."""
        group = _Group(wire.members(self.mesh, rank))
        for position, member in enumerate(group.members):
            self.places[member][wire.lane] = (group, position)
        return self.places[rank][wire.lane]

    def check_operand(self, rank: int, wire: Wire, tensor: Tensor, size: int) -> None:
        if not WIRES[wire.kind].divided:
            return
        if not tensor.dim() or tensor.shape[0] != size:
            raise MismatchError(
                f"{spell_wire(wire, self.names)} needs a first dim of {size}, one part per member",
                rank=rank,
                where=(f"rank {rank} gives {spell_tensor(tensor)}",),
            )

    def check_same(self, exchange: _Exchange, rank: int, wire: Wire, tensor: Tensor) -> None:
        first = exchange.given[exchange.first]
        assert first is not None
        same = wire is exchange.wire or wire == exchange.wire
        if same and tensor.shape == first.shape and tensor.dtype == first.dtype:
            return
        other = exchange.members[exchange.first]
        raise MismatchError(
            f"ranks {other} and {rank} disagree on their collective over `{', '.join(wire.axes)}`",
            rank=rank,
            peers=(other,),
            where=(
                f"rank {other}: {spell_wire(exchange.wire, self.names)} of {spell_tensor(first)}",
                f"rank {rank}: {spell_wire(wire, self.names)} of {spell_tensor(tensor)}",
            ),
            help="run the same program on every rank of a group",
        )

    def deadlock(self) -> DeadlockError:
        """The error that says what each rank waits for, one line for those that wait alike."""
        lines: dict[str, list[int]] = {}
        peers: set[int] = set()
        for rank, handle in enumerate(self.waiting):
            if handle is None:
                continue
            exchange = handle.exchange
            if exchange is None:
                lines.setdefault("a handle whose result it took already", []).append(rank)
                continue
            given = zip(exchange.members, exchange.given, strict=True)
            absent = [member for member, tensor in given if tensor is None]
            peers.update(absent)
            text = f"{spell_ranks(absent)} in {spell_wire(exchange.wire, self.names)}"
            lines.setdefault(text, []).append(rank)
        where = [f"{verb(ranks, 'waits', 'wait')} for {text}" for text, ranks in lines.items()]
        done = sorted(peers - {r for r, handle in enumerate(self.waiting) if handle is not None})
        if done:
            where.append(verb(done, "has finished", "have finished"))
        return DeadlockError(
            "no rank can go on: each waits for another",
            peers=tuple(sorted(peers)),
            where=where,
            help=CALL_SAME_METHODS,
        )

    def spell_place(self, rank: int) -> str:
        return ", ".join(f"{axis}={place}" for axis, place in self.mesh.coords(rank).items())


def spell_tensor(tensor: Tensor) -> str:
    """A tensor as errors name it, with torch's name of the dtype: `float32[2, 3]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
