"""Wires: what transports carry among the ranks of a group, and how programs ask for it.

One row per kind says what each member gets from what all of them give. The virtual mesh computes a
wire this way, and so does every other transport that has nothing faster: a new kind is one row, and
runs on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.rows import Rows

HALF_TYPES = (torch.bfloat16, torch.float16)
COMBINE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


@dataclass(frozen=True, slots=True)
class Wire:
    """What a transport runs over the groups of `axes` (n ranks, in the order of `Mesh.group`).

    `kind` names a row of `WIRES`; `reduce`, `shift` and `root` are for the kinds that read them.
    `index` is the place in the program's list of collectives, for errors.

    With `ends`, the group has two ranks: the source and the target, by their places in that over
    `axes`. The n-th transfer that the source starts on a `channel` meets the n-th of the target.
    """

    kind: str
    axes: tuple[str, ...]
    reduce: str = "sum"
    shift: int = 0
    root: int = 0
    index: int = -1
    ends: tuple[int, int] | None = None
    channel: str = ""

    @property
    def lane(self) -> tuple[object, ...]:
        """The key of all wires that each member of a group starts in one order."""
        return self.axes if self.ends is None else (*self.axes, self.ends, self.channel)

    @property
    def label(self) -> str:
        """The lane as a text: `dp,tp`, or `pp 0>1 forward`."""
        axes = ",".join(self.axes)
        if self.ends is None:
            return axes
        source, target = self.ends
        return f"{axes} {source}>{target} {self.channel}".rstrip()

    def members(self, mesh: Mesh, rank: int) -> tuple[int, ...]:
        """The ranks in the group of `rank`, in order; it need not be an end itself."""
        group = mesh.group(rank, self.axes)
        return group if self.ends is None else tuple(group[end] for end in self.ends)


class Start:
    """Yielded by a program to start a wire; the answer is a handle.

    With `donate` the operand may be overwritten: it is used again only through the result.
    """

    __slots__ = ("donate", "tensor", "wire")

    def __init__(self, wire: Wire, tensor: Any, donate: bool = False) -> None:
        self.wire, self.tensor, self.donate = wire, tensor, donate


class Wait:
    """Yielded by a program to wait for a handle; the answer is the wire's result."""

    __slots__ = ("handle",)

    def __init__(self, handle: Any) -> None:
        self.handle = handle


Receive = Callable[[Wire, int, Sequence[Any], Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class WireKind:
    """What each member of a group gets from what all of them give.

    `receive(wire, place, given, out)` is what the member at `place` gets from `given`, one tensor
    per member: its operand or, where operands are `divided`, its entry for `place` of [n, ...]. The
    result is new memory; or one of `given`, where the kind `forwards`; or the member's own operand,
    where that is no longer needed (`out`) or the kind is a transfer. `sent` is the share of an
    operand that a member, of a transfer the source, sends in a group of n (a `Fraction`, or a
    symbol) under the bandwidth-optimal algorithm. `needs(wire, place, n)` are the members whose
    operands count at `place`, all by default. Where results are `alike`, every member gets the
    same. Operands that are `counted` are `Rows`, not tensors. `options` are the fields of `Wire`
    that it reads.
    """

    name: str
    receive: Receive
    sent: Callable[[Wire, Any], Any]
    needs: Callable[[Wire, int, int], tuple[int, ...]] | None = None
    divided: bool = False
    alike: bool = False
    forwards: bool = False
    counted: bool = False
    options: tuple[str, ...] = ()

    @property
    def stacks(self) -> bool:
        """Whether a member gets what each gives it, along a new first dim."""
        return self.receive is _stacked

    def given(self, operand: Tensor, place: int) -> Tensor:
        """The part of an operand that goes to the member at `place`."""
        return operand[place] if self.divided else operand

    def peers(
        self, wire: Wire, place: int, others: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Of the `others` of a group, those that `place` sends to and those it receives from."""
        if self.needs is None:
            return others, others
        size = len(others) + 1
        sources = self.needs(wire, place, size)
        return (
            [peer for peer in others if place in self.needs(wire, peer, size)],
            [peer for peer in others if peer in sources],
        )


def combine(parts: Sequence[Tensor], reduce: str, out: Tensor | None = None) -> Tensor:
    """The sum, maximum or minimum of `parts` in `out`, or a new tensor; half types round once.

    Neighbours are paired, then pairs, and so on: the order of recursive doubling. So every
    member gets the same bits, whichever transport and algorithm moved the parts.
    """
    dtype = parts[0].dtype
    if len(parts) > 2 and reduce == "sum" and dtype in HALF_TYPES:
        total = combine([part.float() for part in parts], reduce)
        return total.to(dtype) if out is None else out.copy_(total)
    operation = COMBINE[reduce]
    level = list(parts)
    while len(level) > 2:
        odd = level[len(level) & ~1 :]
        # From the second round on the left of a pair is a buffer of this function's own.
        own = len(level) < len(parts)
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [operation(a, b, out=a if own else None) for a, b in pairs] + odd
    if len(level) == 1:
        return level[0].clone() if out is None else out.copy_(level[0])
    if out is None and len(parts) > 2:
        out = level[0]
    return operation(*level, out=out)


def _reduced(wire: Wire, place: int, given: Sequence[Tensor], out: Tensor | None) -> Tensor:
    return combine(given, wire.reduce, out)


def _reduced_at_root(wire: Wire, place: int, given: Sequence[Tensor], out: Tensor | None) -> Tensor:
    if place != wire.root:
        return torch.zeros_like(given[place])
    return combine(given, wire.reduce, out)


def _stacked(wire: Wire, place: int, given: Sequence[Tensor], out: Tensor | None) -> Tensor:
    return torch.stack(tuple(given))


def _shifted(wire: Wire, place: int, given: Sequence[Tensor], out: Tensor | None) -> Tensor:
    return given[(place - wire.shift) % len(given)]


def _from_root(wire: Wire, place: int, given: Sequence[Tensor], out: Tensor | None) -> Tensor:
    return given[wire.root]


def _transferred(wire: Wire, place: int, given: Sequence[Tensor], out: Tensor | None) -> Tensor:
    return given[1].copy_(given[0]) if place else given[0]


def _rows(wire: Wire, place: int, given: Sequence[Rows], out: Tensor | None) -> Tensor:
    result, rows = given[place].taken()
    parts = [each.given().split_with_sizes(each.sent)[place] for each in given]
    torch.cat(parts, out=rows)
    return result


def _once(wire: Wire, n: Any) -> Any:
    return (n - 1) / n


_ROWS = (
    WireKind(
        "all_reduce", _reduced, lambda _, n: 2 * (n - 1) / n, alike=True,
        options=("reduce",),
    ),
    WireKind("all_gather", _stacked, lambda _, n: n - 1, alike=True),
    WireKind("reduce_scatter", _reduced, _once, divided=True, options=("reduce",)),
    WireKind("all_to_all", _stacked, _once, divided=True),
    # As many rows to each member as there are for it: at most all, and no less is known before.
    WireKind("exchange_rows", _rows, lambda *_: 1, counted=True),
    # To the member `shift` places after, cyclically.
    WireKind(
        "permute", _shifted, lambda wire, n: int(wire.shift % n != 0),
        needs=lambda wire, place, n: ((place - wire.shift) % n,), forwards=True,
        options=("shift",),
    ),
    WireKind(
        "broadcast", _from_root, _once, needs=lambda wire, place, n: (wire.root,), forwards=True,
        options=("root",),
    ),
    # To the root; the others get zeros.
    WireKind(
        "reduce", _reduced_at_root, _once,
        needs=lambda wire, place, n: tuple(range(n)) if place == wire.root else (),
        options=("reduce", "root"),
    ),
    # From the first of two ends to the second, which gives a contiguous buffer to receive into.
    # Each end gets back what it gave.
    WireKind(
        "transfer", _transferred, lambda *_: 1,
        needs=lambda wire, place, n: (0,) if place else (), options=("ends", "channel"),
    ),
)  # fmt: skip
WIRES: dict[str, WireKind] = {row.name: row for row in _ROWS}


def receive(
    wire: Wire,
    place: int,
    given: Sequence[Tensor],
    out: Tensor | None = None,
    *,
    keep_others: bool = True,
) -> Tensor:
    """What the member at `place` gets, in `out` or in memory of its own; see `WireKind`.

    Without `keep_others` the result may be the very tensor that another member gave.
    """
    kind = WIRES[wire.kind]
    result = kind.receive(wire, place, given, out)
    if not kind.forwards or result is out:
        return result
    return result.clone() if keep_others or result is given[place] else result


def everyone(wire: Wire, operands: Sequence[Tensor], donated: Sequence[bool] = ()) -> list[Tensor]:
    """What each member gets from the operands of all, in the order of the group.

    No two results share memory. Where all get the same, the result of a member that `donated` its
    operand overwrites it; no result shares memory with any other operand.
    """
    kind, size = WIRES[wire.kind], len(operands)
    if kind.alike:
        first = kind.receive(wire, 0, operands, operands[0] if donated and donated[0] else None)
        if True not in donated or first.shape != operands[0].shape:
            return [first, *[first.clone() for _ in range(size - 1)]]
        pairs = zip(operands[1:], donated[1:], strict=True)
        return [first, *[own.copy_(first) if free else first.clone() for own, free in pairs]]
    if kind.divided:
        given = enumerate(zip(*map(torch.unbind, operands), strict=True))
        return [kind.receive(wire, place, parts, None) for place, parts in given]
    results = [kind.receive(wire, place, operands, None) for place in range(size)]
    return [result.clone() for result in results] if kind.forwards else results
