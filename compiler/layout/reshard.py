"""From any layout to any other: a short chain of collectives, and its cost in bytes.

The chain shrinks the tensor first and grows it last, and takes as many axes at once as it can. It
sends the least possible between the layouts that plans ask for; where axes block each other's
places, it sends up to a third more than the best chain (a test holds that bound).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.alignment import Stretch, align
from meshwright.compiler.layout.collectives import (
    COLLECTIVES,
    CollectiveKind,
    Transfer,
    plan_transfer,
)
from meshwright.compiler.layout.cuts import Cut, Interval, dim_of, is_chain, ordered
from meshwright.compiler.layout.factors import Dim, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.local_ops import shape_after
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import WIRES


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective over `axes` between two canonical layouts."""

    kind: str
    axes: tuple[str, ...]
    source: Layout
    target: Layout

    @property
    def row(self) -> CollectiveKind:
        """The row of its kind."""
        return COLLECTIVES[self.kind]

    def transfer(self, mesh: Mesh) -> Transfer:
        """What each rank does."""
        return plan_transfer(self.kind, self.axes, self.source, self.target, mesh)

    def adjoint(self) -> Collective:
        """The collective that takes the cotangent back."""
        return Collective(self.row.adjoint, self.axes, self.target.dual(), self.source.dual())


# The kind that takes an axis from one state towards another: the first in the table that does.
_TOWARDS: dict[tuple[str, str], str] = {}
for _row in COLLECTIVES.values():
    for _target in (_row.target, *_row.towards):
        _TOWARDS.setdefault((_row.source, _target), _row.name)
        if _row.or_replicated and _row.source == "split":
            _TOWARDS.setdefault(("replicated", _target), _row.name)


def collectives(source: Layout, target: Layout, mesh: Mesh) -> tuple[Collective, ...]:
    """The collectives from one layout of a tensor to another, axes fused where they can be.

    Their layouts are canonical; there are none if the layouts are equal. Raises LayoutError if the
    shapes differ, or if a varying value would have to become replicated or partial: start from the
    value before it was varied.
    """
    return _collectives(source.canonical(mesh), target.canonical(mesh), mesh)


def cost(source: Layout, target: Layout, itemsize: int, mesh: Mesh, differentiable: bool) -> float:
    """The bytes one rank sends for `collectives`, and for their adjoints if `differentiable`."""
    if source is target:
        return 0.0
    volume = _volume(source.canonical(mesh), target.canonical(mesh), mesh, differentiable)
    return volume * itemsize


@lru_cache(maxsize=65536)
def _volume(source: Layout, target: Layout, mesh: Mesh, differentiable: bool) -> float:
    """`cost` in elements."""
    total = 0.0
    for collective in _collectives(source, target, mesh):
        total += elements_sent(collective, mesh)
        if differentiable and collective.source.reduction == "sum":
            total += elements_sent(collective.adjoint(), mesh)
    return total


def elements_sent(collective: Collective, mesh: Mesh) -> float:
    """The elements that one rank sends for a collective."""
    transfer = collective.transfer(mesh)
    if transfer.wire is None:
        return 0.0
    given = shape_after(transfer.before, collective.source.local_shape(mesh))
    share = WIRES[transfer.wire.kind].sent(transfer.wire, mesh.size(collective.axes))
    return float(share * math.prod(given))


@lru_cache(maxsize=65536)
def _collectives(source: Layout, target: Layout, mesh: Mesh) -> tuple[Collective, ...]:
    if source == target:
        return ()
    _check(source, target)
    crossing = {
        axis
        for before, after in zip(source.dims, target.dims, strict=True)
        if align(before, after, mesh) is None
        for axis in dim_axes(before)
    }
    if crossing:
        # Segments end inside the other layout's blocks: only the whole dim is common to both.
        middle = source.drop_split(crossing, mesh).canonical(mesh)
        return (*_collectives(source, middle, mesh), *_collectives(middle, target, mesh))
    return _Reshard(source, target, mesh).run()


def _check(source: Layout, target: Layout) -> None:
    """Raise LayoutError where no collectives lead from one layout to the other."""
    if source.shape != target.shape:
        raise LayoutError(
            f"`{source}` and `{target}` are layouts of different shapes",
            code="wrong-shape",
            help="reshape the value before it is resharded",
        )
    started = target.reduction == "sum" or set(target.partial) <= set(source.partial)
    if not started:
        raise LayoutError(
            f"a pending {target.reduction} cannot be made from `{source}`",
            code="pending-extremum",
            culprit=f"{source} to {target}",
            help="leave the value as it is",
        )
    for axis in source.varying:
        if target.state(axis) in ("replicated", "partial"):
            raise LayoutError(
                f"a value that varies over `{axis}` cannot become {target.state(axis)}",
                code="varying-source",
                culprit=f"{source} to {target}",
                help="start from the value before it was varied",
            )


class _Part:
    """A stretch of a dim, its cuts on the way, and those that it is to have."""

    def __init__(self, stretch: Stretch) -> None:
        self.length, self.cuts, self.goal = stretch.length, set(stretch.before), set(stretch.after)


class _Reshard:
    """The cuts and states on the way from one layout to another."""

    def __init__(self, source: Layout, target: Layout, mesh: Mesh) -> None:
        self.mesh, self.target, self.now = mesh, target, source
        self.dims: list[list[_Part]] = []
        for before, after in zip(source.dims, target.dims, strict=True):
            dim = align(before, after, mesh)
            assert dim is not None
            self.dims.append([_Part(stretch) for stretch in dim])
        self.parts = [part for dim in self.dims for part in dim]
        self.done: list[Collective] = []

    def run(self) -> tuple[Collective, ...]:
        while waiting := self._waiting():
            for kind in COLLECTIVES:
                axes = self._fitting(kind, waiting.get(kind, []))
                if axes:
                    self._append(kind, axes)
                    break
            else:
                self._append(_TOWARDS["split", "replicated"], [self._in_the_way(waiting)])
        return tuple(self.done)

    def _waiting(self) -> dict[str, list[str]]:
        """The axes that are not yet as in the target, by the kind of collective each needs next."""
        found: dict[str, list[str]] = {}
        for axis in self.mesh.names:
            now, goal = self.now.state(axis), self.target.state(axis)
            if now != goal or not self._arrived(axis, now):
                found.setdefault(_TOWARDS[now, goal], []).append(axis)
        return found

    def _arrived(self, axis: str, state: str) -> bool:
        if state == "split":
            return all(_of(axis, part.cuts) == _of(axis, part.goal) for part in self.parts)
        return state != "partial" or self.now.reduction == self.target.reduction

    def _fitting(self, kind: str, axes: list[str]) -> list[str]:
        """As many of the axes as one collective of this kind can take now."""
        if COLLECTIVES[kind].target != "split":
            return axes
        fitting: list[str] = []
        for axis in axes:
            if self._fits([*fitting, axis], moves=COLLECTIVES[kind].source == "split"):
                fitting.append(axis)
        return fitting

    def _fits(self, axes: list[str], *, moves: bool) -> bool:
        """Whether the digits that the axes are to take are free in every stretch."""
        for part in self.parts:
            wanted = _of(axes, part.goal)
            # An axis cannot stay in one segment and move in another.
            if moves and wanted & part.cuts:
                return False
            if not is_chain(ordered(part.cuts | wanted), part.length):
                return False
        return True

    def _in_the_way(self, waiting: dict[str, list[str]]) -> str:
        """The axis that is cheapest to gather of those that block each other's places."""
        return min(waiting[_TOWARDS["split", "split"]], key=self.mesh.size)

    def _append(self, kind: str, axes: list[str]) -> None:
        state = COLLECTIVES[kind].target
        for part in self.parts:
            part.cuts -= _of(axes, part.cuts)
            if state == "split":
                part.cuts |= _of(axes, part.goal)
        following = self.now.drop_partial(axes).drop_varying(axes).with_dims(self._dims())
        if state == "partial":
            following = following.add_partial(axes, self.target.reduction)
        if state == "varying":
            following = following.add_varying(axes)
        target = following.canonical(self.mesh)
        self.done.append(Collective(kind, tuple(axes), self.now, target))
        self.now = target

    def _dims(self) -> list[Dim]:
        parts = ((Interval(part.length, ordered(part.cuts)) for part in dim) for dim in self.dims)
        return [dim_of(dim) for dim in parts]


def _of(axes: str | Iterable[str], cuts: set[Cut]) -> set[Cut]:
    """The cuts by these axes."""
    names = {axes} if isinstance(axes, str) else set(axes)
    return {cut for cut in cuts if cut.axis in names}
