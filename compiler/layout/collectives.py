"""The collectives: one row per kind, with its adjoint and what it is made of.

On each axis a value is replicated, split, partial or varying, and its cotangent has the dual state
(partial and varying change places). So the adjoint of a collective is the one that goes back
between the dual states, and the table is all there is to differentiating communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
from meshwright.compiler.layout.factors import cut, dim_axes, dim_size
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.local_ops import LocalOp
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire


@dataclass(frozen=True, slots=True)
class CollectiveKind:
    """A change of one axis's state, its adjoint, and what ranks do for it.

    `source` and `target` are the states before and after. Steps of composites call a split value
    `one` where only the block at one coordinate, `root`, counts, and `panels` where all blocks do.
    Each rank applies `before` to its own tensor, `wire` carries it to others, if anything moves,
    and `after` is applied to what arrives. With `or_replicated` the split side may be replicated
    too. `towards` are further targets to which this is the first step. Reports and plans count it
    as `counted`, by default its own name. With `by_count`, rows of the first dim go where counts
    say; see `Rows`.
    """

    name: str
    source: str
    target: str
    adjoint: str
    wire: str | None = None
    before: Planner | None = None
    after: Planner | None = None
    or_replicated: bool = False
    towards: tuple[str, ...] = ()
    counted: str = ""
    by_count: bool = False

    @property
    def moves(self) -> bool:
        """Whether bytes move."""
        return self.wire is not None

    @property
    def counted_as(self) -> str:
        """The name under which reports and plans count it."""
        return self.counted or self.name

    @property
    def gathers(self) -> bool:
        """Whether it gives each rank what others held."""
        return self.moves and self.source in ("split", "panels") and self.target != "split"

    @property
    def is_step(self) -> bool:
        """Whether it is a step of a composite, not a change of layout."""
        return not _OF_STEPS.isdisjoint((self.source, self.target))

    @property
    def combines(self) -> bool:
        """Whether it gives each rank one value made of those of all ranks."""
        whole = self.target in ("replicated", "varying")
        return self.moves and whole and self.source in ("split", "partial")

    @property
    def shards(self) -> bool:
        """Whether it takes a replicated value or a pending sum to a shard on each rank."""
        return self.target == "split" and self.source in ("replicated", "partial")

    @property
    def is_view(self) -> bool:
        """Whether the result is a part of the operand's memory."""
        return self.before is own and not self.moves

    @property
    def is_identity(self) -> bool:
        """Whether ranks do nothing: only the meaning of what they hold changes."""
        return not (self.moves or self.before or self.after)

    @property
    def keeps_cuts(self) -> bool:
        """Whether ranks exchange whole blocks, so that every cut stays where it is."""
        blocks = not (self.before or self.after or self.by_count)
        return self.source == self.target == "split" and blocks


_OF_STEPS = {"one", "panels"}
"""What steps of composites call a split value."""

# What shrinks the tensor comes first and what grows it last. A change of layout takes them in this
# order, so that every collective and every adjoint moves as little as possible.
_ROWS = (
    CollectiveKind("narrow", "varying", "split", "pad", before=own, or_replicated=True),
    CollectiveKind("slice", "replicated", "split", "all_gather_replicated", before=own),
    CollectiveKind(
        "reduce_scatter", "partial", "split", "all_gather", "reduce_scatter", before=pull
    ),
    CollectiveKind(
        "all_to_all", "split", "split", "all_to_all", "all_to_all", before=pull, after=push
    ),
    # A pending max or min is reduced before it is a pending sum.
    CollectiveKind(
        "all_reduce", "partial", "replicated", "vary", "all_reduce", towards=("partial", "varying")
    ),
    CollectiveKind("vary", "replicated", "varying", "all_reduce"),
    CollectiveKind(
        "all_gather_replicated", "split", "replicated", "slice", "all_gather", after=push,
        counted="all_gather",
    ),
    CollectiveKind("all_gather", "split", "varying", "reduce_scatter", "all_gather", after=push),
    CollectiveKind("pad", "split", "partial", "narrow", before=pad, or_replicated=True),
    CollectiveKind("permute", "split", "split", "permute", "permute"),
    CollectiveKind(
        "exchange_rows", "split", "split", "exchange_rows", "exchange_rows", by_count=True
    ),
    CollectiveKind("broadcast", "one", "varying", "reduce", "broadcast"),
    CollectiveKind("reduce", "partial", "one", "broadcast", "reduce"),
    CollectiveKind(
        "gather_panels", "panels", "varying", "scatter_panels", "all_gather", after=push,
        counted="all_gather",
    ),
    CollectiveKind(
        "scatter_panels", "partial", "panels", "gather_panels", "reduce_scatter", before=pull,
        counted="reduce_scatter",
    ),
)  # fmt: skip
COLLECTIVES: dict[str, CollectiveKind] = {row.name: row for row in _ROWS}


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

    `shift` is for `permute`. `root` is for `broadcast`, whose target is the root's block alone, and
    for `reduce`, whose target is zero outside of it. Raises LayoutError if the layouts differ in
    more than this kind of change over `axes`.
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
    elif row.by_count:
        _check_rows(kind, axes, source, target)
    else:
        dims = stretches(source.dims, target.dims, () if row.keeps_cuts else axes, mesh)
        if row.before is not None:
            before = local_ops(row.before, dims, axes, mesh)
        if row.after is not None:
            after = local_ops(row.after, dims, axes, mesh)
    if row.wire is None:
        return Transfer(before, None, after)
    return Transfer(before, Wire(row.wire, axes, source.reduction, shift, root), after)


def _as_split(state: str) -> str:
    """The state of an axis that a row calls so."""
    return "split" if state in _OF_STEPS else state


def _check_states(
    row: CollectiveKind, axes: tuple[str, ...], source: Layout, target: Layout
) -> None:
    """Raise LayoutError unless `axes` change as the row says and the others keep their state."""
    for axis in {*axes, *source.axes_used, *target.axes_used}:
        found = (source.state(axis), target.state(axis))
        wanted = (found[0], found[0])
        if axis in axes:
            wanted = (_as_split(row.source), _as_split(row.target))
        for side in (0, 1):
            free = row.or_replicated and axis in axes and wanted[side] == "split"
            if found[side] != wanted[side] and not (free and found[side] == "replicated"):
                raise LayoutError(
                    f"`{row.name}` over `{axis}` goes from {wanted[0]} to {wanted[1]}, not from "
                    f"{found[0]} to {found[1]}",
                    code="wrong-state",
                    culprit=f"{source} to {target}",
                    help="ask `reshard.collectives` for the collectives between two layouts",
                )


def _check_rows(kind: str, axes: tuple[str, ...], source: Layout, target: Layout) -> None:
    """Raise LayoutError unless both are blocks of rows over the same axes, otherwise cut alike."""
    cuts = dim_axes(source.dims[0])
    alike = all(
        layout.dims == (cut(dim_size(layout.dims[0]), *cuts), *source.dims[1:])
        for layout in (source, target)
    )
    if not alike or not set(axes) <= set(cuts):
        raise LayoutError(
            f"`{kind}` over `{', '.join(axes)}` takes rows from `{source}` to `{target}`",
            code="wrong-rows",
            help="cut the first dim into equal blocks over the same axes on both sides",
        )


def _check_block(kind: str, source: Layout, target: Layout, mesh: Mesh) -> None:
    """Raise LayoutError unless the block has the shape of the split value's shard."""
    if source.local_shape(mesh) != target.local_shape(mesh):
        raise LayoutError(
            f"`{kind}` from `{source}` to `{target}` is not a block of the split value",
            code="wrong-block",
            help="split the larger value into blocks of the smaller one's shape",
        )
