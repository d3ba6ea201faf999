"""Two layouts of one tensor, cut into the same stretches, and the local operations between them.

A change of layout over some axes moves those axes' digits: in or out of a dim, or from one dim to
another. `own`, `pad`, `pull` and `push` plan what a rank does to its tensor for that:

    own   keep this rank's digits of whole dims          (slice, narrow)
    pad   put this rank's digits among zeros             (pad)
    pull  move digits from the dims to one front dim     (what reduce_scatter and all_to_all take)
    push  move the front dim's digits into the dims      (what all_gather and all_to_all give)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.cuts import Cut, Cuts, Interval, intervals_of, is_chain, ordered
from meshwright.compiler.layout.factors import Dim, format_dim
from meshwright.compiler.layout.local_ops import (
    BySegment,
    KeepFirst,
    LocalOp,
    Permute,
    Place,
    Reshape,
    Select,
    Spread,
    Take,
)
from meshwright.compiler.layout.mesh import Mesh


class Stretch(NamedTuple):
    """Neighbouring elements of a dim with the cuts they have before and after a change."""

    length: int
    before: Cuts
    after: Cuts

    @property
    def axes(self) -> set[str]:
        """The axes whose cuts change."""
        return {cut.axis for cut in {*self.before} ^ {*self.after}}

    @property
    def staying(self) -> set[Cut]:
        """The cuts that do not change."""
        return {*self.before} & {*self.after}


Stretches = tuple[Stretch, ...]


@lru_cache(maxsize=65536)
def align(source: Dim, target: Dim, mesh: Mesh) -> Stretches | None:
    """The stretches of a dim under two spellings; None if a segment ends inside a block."""
    left, right = list(intervals_of(source, mesh)), list(intervals_of(target, mesh))
    found: list[Stretch] = []
    while left and right:
        length = min(left[-1].length, right[-1].length)
        before, after = left.pop(), right.pop()
        if length % before.period or length % after.period:
            return None
        for stack, interval in ((left, before), (right, after)):
            if interval.length > length:
                stack.append(Interval(interval.length - length, interval.cuts))
        if found and found[-1][1:] == (before.cuts, after.cuts):
            length += found.pop().length
        found.append(Stretch(length, before.cuts, after.cuts))
    return tuple(reversed(found))


class Digit(NamedTuple):
    """A digit of a local index, and the moved axis that takes it before or after the change."""

    size: int
    before: str | None
    after: str | None


Digits = tuple[Digit, ...]


def digits_of(stretch: Stretch) -> Digits:
    """The digits in which a stretch's indices change hands, major first.

    Cuts that stay are left out: a rank holds one value of those digits throughout. Raises
    LayoutError if a cut of the one layout goes through a cut of the other.
    """
    cuts = ordered({*stretch.before, *stretch.after})
    if not is_chain(cuts, stretch.length):
        raise LayoutError("the cuts before and after take parts of each other", code="no-transfer")
    found: list[Digit] = []
    bound = stretch.length
    for cut in cuts:
        _extend(found, bound // cut.extent)
        before, after = cut in stretch.before, cut in stretch.after
        if before != after:
            found.append(Digit(cut.size, cut.axis if before else None, cut.axis if after else None))
        bound = cut.stride
    _extend(found, bound)
    return tuple(found)


def _extend(digits: list[Digit], size: int) -> None:
    """Append elements that every rank holds, as one digit with those before them."""
    if digits and digits[-1].before is None and digits[-1].after is None:
        size *= digits.pop().size
    if size != 1:
        digits.append(Digit(size, None, None))


@dataclass(frozen=True, slots=True)
class Change:
    """A change over `axes` of one stretch per dim, whose digits are in `dims`."""

    dims: tuple[Digits, ...]
    axes: tuple[str, ...]
    mesh: Mesh

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.mesh.size(axis) for axis in self.axes)

    def shape(self, *, before: bool = False, after: bool = False) -> tuple[int, ...]:
        """The local shape without the digits that moved axes take before, after, or both."""
        return tuple(
            math.prod(
                digit.size
                for digit in digits
                if not (before and digit.before) and not (after and digit.after)
            )
            for digits in self.dims
        )

    def missing(self, *, after: bool) -> tuple[str, ...]:
        """The moved axes that take no digit, before or after: they do not cut the segment."""
        taken = {digit.after if after else digit.before for dim in self.dims for digit in dim}
        return tuple(axis for axis in self.axes if axis not in taken)


class _Recorder:
    """Collects operations and leaves out those that change nothing."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.ops: list[LocalOp] = []

    def reshape(self, shape: Sequence[int]) -> None:
        if tuple(shape) != self.shape:
            self.ops.append(Reshape(tuple(shape)))
            self.shape = tuple(shape)

    def permute(self, order: Sequence[int]) -> None:
        if list(order) != sorted(order):
            self.ops.append(Permute(tuple(order)))
            self.shape = tuple(self.shape[i] for i in order)

    def add(self, op: LocalOp, shape: Sequence[int]) -> None:
        self.ops.append(op)
        self.shape = tuple(shape)


def own(change: Change) -> tuple[LocalOp, ...]:
    """Keep this rank's digits."""
    recorder = _Recorder(change.shape(before=True))
    digits = [digit for dim in change.dims for digit in _joined(dim) if not digit[1]]
    recorder.reshape([size for size, _, _ in digits])
    place = 0
    for _, _, axes in digits:
        if axes:
            rest = recorder.shape[:place] + recorder.shape[place + 1 :]
            recorder.add(Select(place, axes), rest)
        else:
            place += 1
    recorder.reshape(change.shape(before=True, after=True))
    return tuple(recorder.ops)


def pad(change: Change) -> tuple[LocalOp, ...]:
    """Put this rank's digits among zeros; what an axis does not cut stays on its first place."""
    recorder = _Recorder(change.shape(before=True))
    uncut = change.missing(after=False)
    if uncut:
        recorder.add(KeepFirst(uncut), recorder.shape)
    digits = [digit for dim in change.dims for digit in _joined(dim)]
    recorder.reshape([size for size, axes, _ in digits if not axes])
    for place, (size, axes, _) in enumerate(digits):
        if axes:
            shape = (*recorder.shape[:place], size, *recorder.shape[place:])
            recorder.add(Place(place, size, axes), shape)
    recorder.reshape(change.shape(after=True))
    return tuple(recorder.ops)


def pull(change: Change) -> tuple[LocalOp, ...]:
    """Move digits from the dims to the front: [ranks, *what stays]."""
    recorder = _Recorder(change.shape(before=True))
    spread = change.missing(after=True)
    for axis in reversed(spread):
        size = change.mesh.size(axis)
        recorder.add(Spread(size), (size, *recorder.shape))
    digits = [digit for dim in change.dims for digit in dim if not digit.before]
    recorder.reshape([*recorder.shape[: len(spread)], *(digit.size for digit in digits)])
    holders = [*spread, *(digit.after for digit in digits)]
    front = [holders.index(axis) for axis in change.axes]
    recorder.permute([*front, *(i for i, axis in enumerate(holders) if not axis)])
    recorder.reshape([math.prod(change.sizes), *change.shape(before=True, after=True)])
    return tuple(recorder.ops)


def push(change: Change) -> tuple[LocalOp, ...]:
    """Move the front digits of [ranks, *what stays] into the dims."""
    rest = change.shape(before=True, after=True)
    recorder = _Recorder([math.prod(change.sizes), *rest])
    digits = [digit for dim in change.dims for digit in dim if not digit.after]
    recorder.reshape([*change.sizes, *(digit.size for digit in digits if not digit.before)])
    same = change.missing(after=False)
    for place in reversed(range(len(change.axes))):
        if change.axes[place] in same:
            recorder.add(Take(place), recorder.shape[:place] + recorder.shape[place + 1 :])
    front = [axis for axis in change.axes if axis not in same]
    following = iter(range(len(front), len(recorder.shape)))
    recorder.permute(
        [front.index(digit.before) if digit.before else next(following) for digit in digits]
    )
    recorder.reshape(change.shape(after=True))
    return tuple(recorder.ops)


def _joined(digits: Digits) -> list[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """The digits as (size, axes before, axes after), neighbours joined where they move alike."""
    found: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = []
    for size, before, after in digits:
        held: tuple[str, ...] = (before,) if before else ()
        wanted: tuple[str, ...] = (after,) if after else ()
        if found and bool(found[-1][1]) == bool(before) and bool(found[-1][2]) == bool(after):
            last = found.pop()
            size, held, wanted = last[0] * size, last[1] + held, last[2] + wanted
        found.append((size, held, wanted))
    return found


Planner = Callable[[Change], tuple[LocalOp, ...]]


def local_ops(
    planner: Planner, dims: Sequence[Stretches], axes: tuple[str, ...], mesh: Mesh
) -> tuple[LocalOp, ...]:
    """The operations of a planner, segment by segment where a dim is a concatenation."""
    concatenated = next((i for i, dim in enumerate(dims) if len(dim) > 1), None)
    if concatenated is None:
        change = Change(tuple(digits_of(dim[0]) for dim in dims), axes, mesh)
        return planner(change)
    segments = []
    for stretch in dims[concatenated]:
        chosen = [*dims[:concatenated], (stretch,), *dims[concatenated + 1 :]]
        alone = Change((digits_of(stretch),), axes, mesh)
        length = alone.shape(before=True, after=planner is push)[0]
        segments.append((length, local_ops(planner, chosen, axes, mesh)))
    front_in, front_out = int(planner is push), int(planner is pull)
    return (BySegment(concatenated + front_in, concatenated + front_out, tuple(segments)),)


def stretches(
    source: Sequence[Dim], target: Sequence[Dim], axes: tuple[str, ...], mesh: Mesh
) -> list[Stretches]:
    """The stretches of each dim; one that `axes` leave alone is a single one of its local length.

    Raises LayoutError if the dims differ in more than `axes`.
    """
    found = []
    for before, after in zip(source, target, strict=True):
        dim = align(before, after, mesh)
        changed = set().union(*(stretch.axes for stretch in dim or ()))
        staying = {cut.axis for stretch in dim or () for cut in stretch.staying}
        if dim is None or not changed <= set(axes) or staying & set(axes):
            over = " and ".join(f"`{axis}`" for axis in axes) or "no axis"
            raise LayoutError(
                f"`{format_dim(before)}` to `{format_dim(after)}` is not a move of {over}",
                code="no-transfer",
                help="ask `reshard.collectives` for the collectives between two layouts",
            )
        if not changed:
            length = sum(Interval(stretch.length, stretch.before).local_length for stretch in dim)
            dim = (Stretch(length, (), ()),)
        found.append(dim)
    return found
