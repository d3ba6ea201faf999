"""The order in which a pipeline runs the graphs of its stages: one small function per schedule.

Ranks have a coordinate along the pipeline, 0 to p - 1. A table says which coordinates have a stage,
and what each runs: F (forward), B (backward for inputs) and W (backward for weights) of a stage on
a microbatch. A whole backward is B and then W, so that the gradient can leave in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Entry
from meshwright.dsl.errors import plural

F, B, W = Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT


@dataclass(frozen=True, slots=True, repr=False)
class Table:
    """What each coordinate along the pipeline runs: in the loop over microbatches and, once
    `completed` of `moves.py` has added that, before and after it, with what is sent meanwhile."""

    microbatches: int
    holders: tuple[tuple[int, ...], ...]
    """By stage: the coordinates that have it, one for each copy."""
    rows: tuple[tuple[Entry, ...], ...]
    """By coordinate: what it runs, in order."""
    overlapped: frozenset[Action] = frozenset()
    """Forwards that may run at the same time as the whole backward that follows them."""

    def __repr__(self) -> str:
        p, stages = plural(len(self.rows), "rank"), plural(len(self.holders), "stage")
        return f"<Table of {p} and {stages}, microbatches: {self.microbatches}>"

    @property
    def virtual(self) -> int:
        """The number of stages per coordinate, not counting copies."""
        return len(self.holders) // len(self.rows)

    @property
    def evaluation(self) -> Table:
        """The same stages on the same coordinates, of which the first copy runs one forward."""
        homes = list(enumerate(holders[0] for holders in self.holders))
        rows = [tuple(Action(F, s) for s, home in homes if home == c) for c in self.coordinates]
        return Table(1, self.holders, tuple(rows))

    @property
    def coordinates(self) -> range:
        """The coordinates along the pipeline."""
        return range(len(self.rows))


@dataclass(frozen=True, slots=True)
class Size:
    """How many coordinates, microbatches, and stages per coordinate a table is for."""

    coordinates: int
    microbatches: int
    virtual: int = 1

    @property
    def round(self) -> int:
        """How many microbatches a coordinate takes through one stage before it goes on with its
        next: PyTorch's rule, which is Megatron's where the coordinates divide the microbatches."""
        return self.microbatches // max(1, self.microbatches // self.coordinates)


@dataclass(slots=True)
class _Row:
    """The actions of a coordinate as they are listed; each kind of action takes the microbatches of
    a stage in order."""

    microbatches: dict[int, range]
    """By stage: those that it runs."""
    actions: list[Action] = field(default_factory=list)
    overlapped: list[Action] = field(default_factory=list)
    _counts: dict[tuple[Phase, int], int] = field(default_factory=dict)
    _pending: list[Action] = field(default_factory=list)
    """Weight gradients of the backwards so far."""

    def _run(self, kind: Phase, stage: int) -> Action:
        count = self._counts[kind, stage] = 1 + self._counts.get((kind, stage), 0)
        self.actions.append(Action(kind, stage, self.microbatches[stage][count - 1]))
        return self.actions[-1]

    def forwards(self, *stages: int) -> None:
        for stage in stages:
            self._run(F, stage)

    def backward(self, stage: int) -> None:
        action = self._run(B, stage)
        self._pending.append(Action(W, stage, action.microbatch))

    def weights(self, most: int | None = None, stage: int | None = None) -> None:
        """The oldest pending weight gradients, of one stage or of all."""
        chosen = [each for each in self._pending if stage in (None, each.stage)][:most]
        self.actions += chosen
        self._pending = [each for each in self._pending if each not in chosen]

    def whole(self, stage: int) -> None:
        """A backward and its own weight gradients."""
        self.backward(stage)
        self.actions.append(self._pending.pop())

    def pair(self, forward: int, backward: int, *, together: bool = True) -> None:
        """A forward, and a whole backward that may run at the same time."""
        action = self._run(F, forward)
        if together:
            self.overlapped.append(action)
        self.whole(backward)

    def left(self, kind: Phase, stage: int) -> int:
        """How many microbatches a kind of action has not taken yet."""
        return len(self.microbatches[stage]) - self._counts.get((kind, stage), 0)


# -- one stage per coordinate, or multiple of which the last is followed by the first ------------


def gpipe(size: Size) -> Table:
    """All forwards, then all backwards, stage by stage (Huang et al. 2019; with multiple stages per
    coordinate, the breadth-first order of Lamy-Poirier 2023)."""
    every = size.microbatches * size.virtual
    return _looped(size, size.microbatches, lambda r: every)


def one_forward_one_backward(size: Size) -> Table:
    """A backward as soon as there is one (Narayanan et al. 2019)."""
    return _looped(size, size.round, lambda r: size.coordinates - 1 - r)


def interleaved(size: Size) -> Table:
    """The same with multiple stages per coordinate (Narayanan et al. 2021)."""
    ahead = (size.virtual - 1) * size.round
    return _looped(size, size.round, lambda r: ahead + 2 * (size.coordinates - 1 - r))


def zero_bubble(size: Size) -> Table:
    """Weight gradients run where there is nothing else to do (ZB-H1, Qi et al. 2024)."""
    ahead = (size.virtual - 1) * size.round
    return _looped(size, size.round, lambda r: ahead + size.coordinates - 1 - r, lambda r: r)


def zero_bubble_ahead(size: Size) -> Table:
    """The same with up to twice as many forwards ahead of the first backward (ZB-H2)."""
    last = size.coordinates - 1
    return _looped(size, size.round, lambda r: 2 * (last - r), lambda r: 2 * r)


def _looped(
    size: Size,
    round: int,
    ahead: Callable[[int], int],
    behind: Callable[[int], int] = lambda r: 0,
) -> Table:
    """`ahead` forwards, then a forward and a backward in turn; weight gradients are that of
    `behind` backwards before. Both depend on the coordinate."""
    p, v = size.coordinates, size.virtual
    order = [k // round % v for k in range(size.microbatches * v)]
    rows = []
    for r in range(p):
        row = _Row({chunk * p + r: range(size.microbatches) for chunk in range(v)})
        forwards = iter([chunk * p + r for chunk in order])
        row.forwards(*islice(forwards, ahead(r)))
        for i, chunk in enumerate(order):
            row.forwards(*islice(forwards, 1))
            row.backward((v - 1 - chunk) * p + r)
            row.weights(1 if i >= behind(r) else 0)
        row.weights()
        rows.append(row)
    return _table(size, rows, [(stage % p,) for stage in range(p * v)])


# -- two stages per coordinate, down and up again ------------------------------------------------


def zero_bubble_v(size: Size) -> Table:
    """Stages go down the coordinates and up again (ZB-V, Qi et al. 2024)."""
    p = size.coordinates
    rows = []
    for r in range(p):
        down, up = r, 2 * p - 1 - r
        row = _Row(dict.fromkeys((down, up), range(max(size.microbatches, 2 * p - 1))))
        row.forwards(*[down] * (2 * (p - r) - 1), *[up, down] * r)
        for _ in range(p - r):
            row.forwards(up)
            row.whole(up)
        while row.left(F, up):
            row.forwards(*[down] * min(1, row.left(F, down)))
            row.whole(down)
            row.forwards(up)
            row.whole(up)
        for _ in range(r):
            row.backward(down)
            row.backward(up)
        while row.left(B, down):
            row.backward(down)
            row.weights(1, down)
        row.weights(stage=up)
        row.weights()
        rows.append(row)
    return _table(size, rows, _vee(p))


def dualpipe(size: Size) -> Table:
    """Every stage is on two coordinates, half of the microbatches enter at either end, and a
    forward of one half runs with a backward of the other (DeepSeek-V3, 2024)."""
    p, half = size.coordinates, size.microbatches // 2
    rows = []
    for r in range(p):
        row = _Row({r: range(half), p - 1 - r: range(half, 2 * half)})
        ends = (r, p - 1 - r) if r < p // 2 else (p - 1 - r, r)
        _meet(row, *ends, p // 2, min(r, p - 1 - r), half - p)
        rows.append(row)
    return _table(size, rows, [(stage, p - 1 - stage) for stage in range(p)])


def dualpipe_v(size: Size) -> Table:
    """One half of DualPipe: both directions of the stages of ZB-V."""
    p, m = size.coordinates, size.microbatches
    rows = []
    for r in range(p):
        row = _Row(dict.fromkeys((r, 2 * p - 1 - r), range(m)))
        _meet(row, r, 2 * p - 1 - r, p, r, m - 2 * p)
        rows.append(row)
    return _table(size, rows, _vee(p))


def _meet(row: _Row, near: int, far: int, half: int, depth: int, steady: int) -> None:
    """The row of DualPipe at `depth` of `half` coordinates: microbatches enter at the stage `near`
    and come back to the stage `far`."""
    rest = half - depth - 1
    row.forwards(*[near] * 2 * rest, *[near, far] * (depth + 1))
    for _ in range(rest):
        row.backward(far)
        row.weights(1)
        row.forwards(far)
    for i in range(steady + depth + 1):
        row.pair(near, far, together=bool(i or rest))
        row.pair(far, near)
    for _ in range(rest):
        row.whole(far)
        row.pair(far, near)
    for i in range(2 * (depth + 1)):
        (row.whole if i <= depth else row.backward)((far, near)[i % 2])
    for _ in range(rest):
        row.weights(1)
        row.backward(near)
    row.weights()


def _vee(p: int) -> Iterable[tuple[int, ...]]:
    """By stage: its coordinate, where stages go down the coordinates and up again."""
    return [(min(stage, 2 * p - 1 - stage),) for stage in range(2 * p)]


def _table(size: Size, rows: Iterable[_Row], holders: Iterable[tuple[int, ...]]) -> Table:
    rows = list(rows)
    kept = [tuple(a for a in row.actions if a.microbatch < size.microbatches) for row in rows]
    overlapped = frozenset(action for row in rows for action in row.overlapped)
    return Table(size.microbatches, tuple(holders), tuple(kept), overlapped)
