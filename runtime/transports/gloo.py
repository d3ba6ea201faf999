"""Collectives over Gloo, composed of sends and receives where that is faster than Gloo's own.

A send or receive runs in the calling thread. Gloo's own collectives run in a thread of its pool,
and two hand-overs between threads cost about 100 microseconds. The table below holds what was
measured with two and four processes on two cores, torch 2.13, loopback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from meshwright.compiler.layout.rows import Rows
from meshwright.compiler.layout.wires import COMBINE, HALF_TYPES, WIRES, Wire, receive
from meshwright.runtime.transports import native
from meshwright.runtime.transports.native import Begun
from meshwright.runtime.world.connections import connections

Algorithm = Callable[["GlooGroup", Wire, Tensor, bool], Begun]

KIB, MIB = 2**10, 2**20
_NATIVE_REDUCES = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
}
_SCRATCH_BYTES = 64 * MIB


class GlooGroup:
    """The processes of one group; `members` are ranks, in the order of the group."""

    def __init__(self, store: Store, members: tuple[int, ...], rank: int, timeout: float) -> None:
        self.members = members
        self.size, self.position = len(members), members.index(rank)
        self.others = [(self.position + step) % self.size for step in range(1, self.size)]
        before = set(connections())
        self.backend: Any = ProcessGroupGloo(
            store, self.position, self.size, timedelta(seconds=timeout)
        )
        self.connections = [found for found in connections() if found not in before]
        self._scratch: dict[tuple[Any, ...], list[Tensor]] = {}
        self._scratch_bytes = 0
        self._choices: dict[tuple[str, bool], list[tuple[float, Algorithm]]] = {}

    def begin(self, wire: Wire, tensor: Any, started: bool, donate: bool) -> Begun:
        """Post a collective; one that is `started` must not need a second round of messages."""
        if WIRES[wire.kind].counted:
            return _rows(self, wire, tensor, donate)
        if not tensor.is_contiguous():
            tensor, donate = tensor.contiguous(), True
        choices = self._choices.get((wire.kind, started))
        if choices is None:
            choices = self._choices[wire.kind, started] = choose(wire.kind, self.size, started)
        num_bytes = tensor.nbytes
        algorithm = next(
            algorithm
            for most, algorithm in choices
            if num_bytes <= most
            and (algorithm not in _REDUCES_NATIVELY or tensor.dtype in _NATIVE_REDUCES)
        )
        return algorithm(self, wire, tensor, donate)

    def scratch(self, like: Tensor, count: int) -> list[Tensor]:
        """`count` buffers of the shape of `like`, free again when the collective has its result.

        Large new buffers cost one page fault per 4 KiB, as much as moving the bytes.
        """
        key = (like.shape, like.dtype, count)
        found = self._scratch.get(key)
        if found is not None:
            return found
        buffers = [torch.empty_like(like) for _ in range(count)]
        num_bytes = count * like.nbytes
        if num_bytes <= _SCRATCH_BYTES:
            if self._scratch_bytes + num_bytes > _SCRATCH_BYTES:
                self._scratch.clear()
                self._scratch_bytes = 0
            self._scratch[key] = buffers
            self._scratch_bytes += num_bytes
        return buffers

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> list[Any]:
        """Post messages to and from members; those that cross do not wait for one another.

        Receiving first saves a message where two processes have a core each. Where four share two
        cores, it costs a time slice of the scheduler (4 ms) every other time.
        """
        backend = self.backend
        if self.size == 2:
            works = [backend.recv([tensor], peer, 0) for tensor, peer in receives]
            works += [backend.send([tensor], peer, 0) for tensor, peer in sends]
            return works
        sent = [backend.send([tensor], peer, 0) for tensor, peer in sends]
        return [backend.recv([tensor], peer, 0) for tensor, peer in receives] + sent

    def abort(self) -> None:
        """Close the connections, so that a thread that waits on one returns with an error.

        Gloo has no other way: its `abort` leaves a waiting thread waiting.
        """
        for connection in self.connections:
            connection.abort()

    def close(self) -> None:
        """Let go of Gloo's threads; otherwise the process aborts when it exits."""
        self._scratch.clear()
        del self.backend


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


def _direct(
    group: GlooGroup, wire: Wire, tensor: Tensor, donate: bool, *, scratch: bool = False
) -> Begun:
    """Send each operand straight to the members that need it, which works for any kind of wire."""
    kind = WIRES[wire.kind]
    targets, sources = kind.peers(wire, group.position, group.others)
    parts = tensor.unbind(0) if kind.divided else [tensor] * group.size
    own = parts[group.position]
    if scratch:
        received = group.scratch(own, len(sources))
    else:
        received = [torch.empty_like(own) for _ in sources]
    works = group.exchange(
        [(parts[peer], peer) for peer in targets], list(zip(received, sources, strict=True))
    )

    def finish() -> Tensor:
        given = [own] * group.size
        for peer, part in zip(sources, received, strict=True):
            given[peer] = part
        out = tensor if donate and not kind.divided else None
        if out is None and received and not scratch and "reduce" in kind.options:
            out = received[0]  # new memory costs page faults
        return receive(wire, group.position, given, out, keep_others=scratch)

    return works, finish


def _direct_in_scratch(group: GlooGroup, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    return _direct(group, wire, tensor, donate, scratch=True)


def _double(group: GlooGroup, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    """Recursive doubling: log2(n) rounds, in each of which pairs of halves exchange their sums."""
    wide = wire.reduce == "sum" and group.size > 2 and tensor.dtype in HALF_TYPES
    total = tensor.float() if wide else tensor
    buffers = group.scratch(total, int(math.log2(group.size)))
    peer = group.position ^ 1
    works = group.exchange([(total, peer)], [(buffers[0], peer)])

    def finish() -> Tensor:
        place, total_here = group.position, COMBINE[wire.reduce](total, buffers[0])
        for round_number, buffer in enumerate(buffers[1:], 1):
            peer = place ^ (1 << round_number)
            _wait(group.exchange([(total_here, peer)], [(buffer, peer)]))
            total_here = COMBINE[wire.reduce](total_here, buffer)
        return total_here.to(tensor.dtype) if wide else total_here

    return works, finish


def _scatter_and_gather(group: GlooGroup, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    """Reduce one part per member, then exchange the parts: 2(n-1)/n of the bytes, two rounds."""
    length = -(-tensor.numel() // group.size)
    flat = tensor.reshape(-1)
    if length * group.size != flat.numel():
        flat = torch.nn.functional.pad(flat, (0, length * group.size - flat.numel()))
        donate = True
    source = flat.view(group.size, length)
    scatter = Wire("reduce_scatter", wire.axes, wire.reduce)
    works, reduced = _direct_in_scratch(group, scatter, source, False)

    def finish() -> Tensor:
        whole = source if donate else torch.empty_like(source)
        gather, gathered = _gather_into(group, whole, reduced())
        _wait(gather)
        return gathered().view(-1)[: tensor.numel()].view(tensor.shape)

    return works, finish


def _gather_into(group: GlooGroup, whole: Tensor, own: Tensor) -> Begun:
    parts = whole.unbind(0)
    works = group.exchange(
        [(own, peer) for peer in group.others], [(parts[peer], peer) for peer in group.others]
    )
    parts[group.position].copy_(own)
    return works, lambda: whole


def _direct_all_gather(group: GlooGroup, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    return _gather_into(group, tensor.new_empty((group.size, *tensor.shape)), tensor)


def _direct_all_to_all(group: GlooGroup, wire: Wire, tensor: Tensor, donate: bool) -> Begun:
    whole = torch.empty_like(tensor)
    given, taken = tensor.unbind(0), whole.unbind(0)
    works = group.exchange(
        [(given[peer], peer) for peer in group.others],
        [(taken[peer], peer) for peer in group.others],
    )
    taken[group.position].copy_(given[group.position])
    return works, lambda: whole


def _rows(group: GlooGroup, wire: Wire, given: Rows, donate: bool) -> Begun:
    """Send each member as many rows as there are for it: nothing, where there are none."""
    result, rows = given.taken()
    parts = given.given().split_with_sizes(given.sent)
    places = rows.split_with_sizes(given.received)
    works = group.exchange(
        [(parts[peer], peer) for peer in group.others if parts[peer].numel()],
        [(places[peer], peer) for peer in group.others if places[peer].numel()],
    )
    places[group.position].copy_(parts[group.position])
    return works, lambda: result


@dataclass(frozen=True, slots=True)
class Row:
    """The algorithm for a kind of wire in groups of `sizes` and operands of up to `max_bytes`."""

    kind: str
    sizes: tuple[int, ...]
    max_bytes: float
    algorithm: Algorithm
    alone: bool = False


_ANY = tuple(range(2, 17))
_DOUBLING = (4, 8, 16)
ALGORITHMS: tuple[Row, ...] = (
    Row("all_reduce", (2,), MIB, _direct_in_scratch, alone=True),
    Row("all_reduce", _DOUBLING, 512 * KIB, _double, alone=True),
    Row("all_reduce", (2, 3, 4), 8 * MIB, _scatter_and_gather, alone=True),
    Row("all_reduce", _ANY, 256 * KIB, _direct),
    Row("all_reduce", (), math.inf, native.all_reduce),
    Row("all_gather", _ANY, math.inf, _direct_all_gather),
    Row("all_gather", (), math.inf, native.all_gather),
    Row("reduce_scatter", (), math.inf, _direct_in_scratch, alone=True),
    Row("all_to_all", (), math.inf, _direct_all_to_all),
    Row("broadcast", (2, 3, 4), math.inf, _direct),
    Row("broadcast", (), math.inf, native.broadcast),
    Row("reduce", (2, 3, 4), math.inf, _direct),
    Row("reduce", (), math.inf, native.reduce),
    Row("transfer", (), math.inf, native.transfer),
)
"""The first row that fits is taken, or `_direct` if none does; no `sizes` means every size. A row
that is `alone` is not for a collective that is started and waited for later: it has a second round
of messages, or a buffer that it shares with others."""

_REDUCES_NATIVELY = (native.all_reduce, native.reduce)


def choose(kind: str, size: int, started: bool) -> list[tuple[float, Algorithm]]:
    """The algorithms for `kind` in a group of `size`: (most bytes, algorithm), best first."""
    rows = [
        (row.max_bytes, row.algorithm)
        for row in ALGORITHMS
        if row.kind == kind and (not row.sizes or size in row.sizes) and not (started and row.alone)
    ]
    return [*rows, (math.inf, _direct)]
