"""The collectives: one table of kinds with their adjoints, and what each is made of.

On each axis a value is replicated, split, partial or varying, and its cotangent has the dual state
(partial and varying change places). So the adjoint of a collective is the one that goes back
between the dual states, and the table is all there is to differentiating communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.alignment import (
    Planner,
    local_ops,
    own,
    pad,
    pull,
    push,
    stretches,
)
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.local_ops import LocalOp
from meshwright.compiler.layout.mesh import Mesh


@dataclass(frozen=True, slots=True)
class CollectiveKind:
    """A change of one axis's state, its adjoint, and the wire that carries it, if any does.

    The state `one` is a split value of which only the block of one coordinate, `root`, counts.
    `pad` and `narrow` also go between replicated and partial or varying: nothing moves there.
    """

    name: str
    source: str
    target: str
    adjoint: str
    wire: str | None

    @property
    def moves(self) -> bool:
        """Whether bytes move."""
        return self.wire is not None


_KINDS = (
    CollectiveKind("vary", "replicated", "varying", "all_reduce", None),
    CollectiveKind("all_reduce", "partial", "replicated", "vary", "all_reduce"),
    CollectiveKind("all_gather", "split", "varying", "reduce_scatter", "all_gather"),
    CollectiveKind("all_gather_replicated", "split", "replicated", "slice", "all_gather"),
    CollectiveKind("reduce_scatter", "partial", "split", "all_gather", "reduce_scatter"),
    CollectiveKind("slice", "replicated", "split", "all_gather_replicated", None),
    CollectiveKind("narrow", "varying", "split", "pad", None),
    CollectiveKind("pad", "split", "partial", "narrow", None),
    CollectiveKind("all_to_all", "split", "split", "all_to_all", "all_to_all"),
    CollectiveKind("permute", "split", "split", "permute", "permute"),
    CollectiveKind("broadcast", "one", "varying", "reduce", "broadcast"),
    CollectiveKind("reduce", "partial", "one", "broadcast", "reduce"),
)
COLLECTIVES: dict[str, CollectiveKind] = {kind.name: kind for kind in _KINDS}

# What a rank does before the wire, and after it.
_BEFORE: dict[str, Planner] = {
    "slice": own,
    "narrow": own,
    "pad": pad,
    "reduce_scatter": pull,
    "all_to_all": pull,
}
_AFTER: dict[str, Planner] = {
    "all_gather": push,
    "all_gather_replicated": push,
    "all_to_all": push,
}
_ALSO = {("pad", "source"): "replicated", ("narrow", "target"): "replicated"}


@dataclass(frozen=True, slots=True)
class Wire:
    """What a transport runs over the groups of `axes` (n ranks, in the order of `Mesh.group`).

    `all_reduce`: x to the same shape. `all_gather`: x to [n, *x.shape], in group order.
    `reduce_scatter`: [n, ...] to the reduction of the rank's entry. `all_to_all`: entry i of the
    result is entry `rank` of rank i's [n, ...]. `permute`: the x of the member `shift` places
    before, cyclically. `broadcast`: root's x. `reduce`: the sum at root, zeros elsewhere.
    `index` is the place in the program's list of collectives, for errors.
    """

    kind: str
    axes: tuple[str, ...]
    reduce: str = "sum"
    shift: int = 0
    root: int = 0
    index: int = -1


class Start:
    """Yielded by a program to start a wire; the answer is a handle.

    With `donate` the operand may be overwritten, and is not used again but through the result.
    """

    __slots__ = ("donate", "tensor", "wire")

    def __init__(self, wire: Wire, tensor: Any, donate: bool = False) -> None:
        self.wire, self.tensor, self.donate = wire, tensor, donate


class Wait:
    """Yielded by a program to wait for a handle; the answer is the wire's result."""

    __slots__ = ("handle",)

    def __init__(self, handle: Any) -> None:
        self.handle = handle


@dataclass(frozen=True, slots=True)
class Transfer:
    """A collective between two concrete layouts: what a rank does before the wire and after."""

    before: tuple[LocalOp, ...]
    wire: Wire | None
    after: tuple[LocalOp, ...]


@lru_cache(maxsize=16384)
def plan_transfer(
    kind: str,
    axes: tuple[str, ...],
    source: Layout,
    target: Layout,
    mesh: Mesh,
    *,
    shift: int = 0,
    root: int = 0,
) -> Transfer:
    """How each rank gets from `source` to `target` by one collective over `axes`.

    `shift` is for `permute`; `root` for `broadcast`, whose target is the root's block alone, and
    `reduce`, whose target is zero outside of it. Raises LayoutError if the layouts differ in more
    than this kind of change over `axes`.
    """
    axes = tuple(axis for axis in axes if mesh.size(axis) > 1)
    source, target = source.canonical(mesh), target.canonical(mesh)
    if not axes:
        return Transfer((), None, ())
    row = COLLECTIVES[kind]
    _check_states(row, axes, source, target)
    before: tuple[LocalOp, ...] = ()
    after: tuple[LocalOp, ...] = ()
    if row.source == "one" or row.target == "one":
        _check_block(kind, source, target, mesh)
    else:
        # A permutation of whole blocks leaves every cut where it is.
        moved = () if kind == "permute" else axes
        dims = stretches(source.dims, target.dims, moved, mesh)
        if kind in _BEFORE:
            before = local_ops(_BEFORE[kind], dims, axes, mesh)
        if kind in _AFTER:
            after = local_ops(_AFTER[kind], dims, axes, mesh)
    if row.wire is None:
        return Transfer(before, None, after)
    return Transfer(before, Wire(row.wire, axes, source.reduction, shift, root), after)


def bytes_sent(wire: Wire, local_numel_in: int, itemsize: int, mesh: Mesh) -> int:
    """The bytes that one rank sends for its operand, under the bandwidth-optimal algorithm."""
    ranks, size = mesh.size(wire.axes), local_numel_in * itemsize
    if wire.kind == "all_gather":
        return (ranks - 1) * size
    if wire.kind == "permute":
        return size if wire.shift % ranks else 0
    times = 2 if wire.kind == "all_reduce" else 1
    return times * (ranks - 1) * size // ranks


def _check_states(
    row: CollectiveKind, axes: tuple[str, ...], source: Layout, target: Layout
) -> None:
    """Each axis changes as the row says; the other axes keep their state."""
    for axis in {*axes, *source.axes_used, *target.axes_used}:
        found = (source.state(axis), target.state(axis))
        wanted = (
            "split" if row.source == "one" else row.source,
            row.target.replace("one", "split"),
        )
        if axis not in axes:
            wanted = (found[0], found[0])
        also = (_ALSO.get((row.name, "source")), _ALSO.get((row.name, "target")))
        for side in (0, 1):
            if found[side] != wanted[side] and (axis not in axes or found[side] != also[side]):
                raise LayoutError(
                    f"`{row.name}` over `{axis}` goes from {wanted[0]} to {wanted[1]}, not from "
                    f"{found[0]} to {found[1]}",
                    code="wrong-state",
                    culprit=f"{source} to {target}",
                    help="ask `reshard.collectives` for the collectives between two layouts",
                )


def _check_block(kind: str, source: Layout, target: Layout, mesh: Mesh) -> None:
    """A block is on its root what the whole value's shard is there."""
    if source.local_shape(mesh) != target.local_shape(mesh):
        raise LayoutError(
            f"`{kind}` from `{source}` to `{target}` is not a block of the split value",
            code="wrong-block",
            help="split the larger value into blocks of the smaller one's shape",
        )
