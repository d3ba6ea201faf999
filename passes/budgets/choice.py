"""Choose how many modules of each run become which regions: an integer program over counts.

Equal modules are told apart by nothing but their order, and of the same regions in any order, the
least is needed if those come first whose own backward holds most above what they save. So a
choice is how many regions of each kind a run has, and the peak is bounded where each kind's
backward runs: what the regions before it save, and what it holds itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from meshwright.compiler.solving.integer import TOLERANCE, IntegerProgram, Solution


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of region: so many modules in one (0 for one module that is no region), the words
    after its `keep=`, the bytes that it saves, those while its backward runs, and the operations
    that it costs: what it computes again or, if what it saves is `away` meanwhile, could compute
    while it waits for that."""

    length: int
    keep: tuple[str, ...]
    saved: int
    peak: int
    cost: int
    away: bool = False

    @property
    def modules(self) -> int:
        return max(self.length, 1)


@dataclass(frozen=True, slots=True)
class Options:
    """The kinds that the regions of a run may be, which must add up to its `size` in modules.

    `base` are the bytes alive in its backward that belong to no run.
    """

    stage: int
    size: int
    kinds: tuple[Kind, ...]
    base: int


@dataclass(frozen=True, slots=True)
class Gap:
    """A part of the backward of a stage that is in no run: `base` bytes are alive there, and what
    the first runs save, so `many`."""

    stage: int
    many: int
    base: int


@dataclass(frozen=True, slots=True)
class Place:
    """The ranks at one coordinate of a pipeline: for how many microbatches they hold what a stage
    saves, by stage, and the bytes that they hold besides."""

    flying: Mapping[int, int]
    rest: int


@dataclass(frozen=True, slots=True)
class Bound:
    """A position of the backward of a stage: what the first kinds up to `end` save is alive, and so
    many `bytes` besides. With `kind`, a run and a kind of it, only where there is one such."""

    stage: int
    end: int
    bytes: int
    kind: tuple[int, int] | None


Counts: TypeAlias = tuple[tuple[int, ...], ...]
"""By run and kind: the number of regions."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Regions, the operations that they compute again, and how many there must at least be."""

    counts: Counts
    cost: int
    bound: int


@dataclass(frozen=True)
class Problem:
    """The runs in the order of the forward, the gaps between them, and the places."""

    options: tuple[Options, ...]
    gaps: tuple[Gap, ...]
    places: tuple[Place, ...]

    def best(self, budget: int) -> Chosen | None:
        """The least to compute again so that no place holds more than the budget on paper."""
        first = found = self._solved(_Model(self), budget)
        within = budget
        while found is not None and (most := max(self.peaks(found.counts))) > budget:
            # To HiGHS, what is a millionth above the budget is within it.
            within -= most - budget + math.ceil(TOLERANCE * budget)
            found = self._solved(_Model(self), within)
        return found and first and replace(found, bound=first.bound)

    def least(self) -> Chosen:
        """What needs the least memory on paper."""
        size = max(self._most(), 1)
        model = _Model(self, peak_cost=1e6)
        found = self._solved(model, size)
        assert found is not None
        return found

    def _most(self) -> int:
        """More bytes than any choice comes to."""
        flying = max(max(place.flying.values(), default=1) for place in self.places)
        rest = max(place.rest for place in self.places)
        bases = sum(each.base for each in self.options) + sum(gap.base for gap in self.gaps)
        sizes = (each.size * max(kind.peak for kind in each.kinds) for each in self.options)
        return max(rest, 0) + bases + (flying + 1) * sum(sizes) + 1

    def _solved(self, model: _Model, budget: int) -> Chosen | None:
        found = model.solve(budget)
        if found is None:
            return None
        counts = tuple(
            tuple(round(found.values[variable]) for variable in own) for own in model.counts
        )
        return Chosen(counts, self.cost(counts), math.ceil(found.bound * model.scale))

    def cost(self, counts: Counts) -> int:
        """The operations that regions compute again in one microbatch."""
        pairs = zip(self.options, counts, strict=True)
        return sum(k.cost * n for each, own in pairs for k, n in zip(each.kinds, own, strict=True))

    def peaks(self, counts: Counts) -> list[int]:
        """The bytes at each place, on paper."""
        before = self.before(counts)
        found = []
        for place in self.places:
            others = {
                stage: sum(
                    (times - (other == stage)) * before[other][-1]
                    for other, times in place.flying.items()
                )
                for stage in place.flying
            }
            most = [
                place.rest + bound.bytes + others[bound.stage] + before[bound.stage][bound.end]
                for bound in self.bounds()
                if bound.stage in place.flying
                and (bound.kind is None or counts[bound.kind[0]][bound.kind[1]])
            ]
            found.append(max(most, default=place.rest))
        return found

    def before(self, counts: Counts) -> dict[int, list[int]]:
        """By stage: the bytes that the first kinds of its runs save, from none on to all."""
        stages = {stage for place in self.places for stage in place.flying}
        found: dict[int, list[int]] = {stage: [0] for stage in sorted(stages)}
        for each, own in zip(self.options, counts, strict=True):
            for kind, count in zip(each.kinds, own, strict=True):
                sums = found[each.stage]
                sums.append(sums[-1] + kind.saved * count)
        return found

    def bounds(self) -> Iterator[Bound]:
        """Where the peak may be: in the gaps, and where the backward of each kind runs."""
        ends: dict[int, int] = {}
        firsts: dict[int, list[int]] = {}
        for r, each in enumerate(self.options):
            firsts.setdefault(each.stage, []).append(ends.get(each.stage, 0))
            for k, kind in enumerate(each.kinds):
                ends[each.stage] = ends.get(each.stage, 0) + 1
                most = each.base + kind.peak - kind.saved
                yield Bound(each.stage, ends[each.stage], most, (r, k))
        for gap in self.gaps:
            starts = [*firsts.get(gap.stage, []), ends.get(gap.stage, 0)]
            yield Bound(gap.stage, starts[gap.many], gap.base, None)


def ordered(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Kinds without those that another is better than, those first whose backward holds most above
    what they save. A module that keeps the least stays, on the device and away: it may hold less
    than it does on paper."""
    plain = [
        min((k for k in kinds if (k.length, k.away) == (1, away)), key=lambda k: len(k.keep))
        for away in {k.away for k in kinds if k.length == 1}
    ]
    best = [
        kind
        for i, kind in enumerate(kinds)
        if any(kind is each for each in plain)
        or not any(_is_better(other, kind, j < i) for j, other in enumerate(kinds))
    ]
    return tuple(sorted(best, key=lambda each: (each.saved - each.peak, each.cost, each.length)))


def _is_better(one: Kind, other: Kind, first: bool) -> bool:
    """Whether one kind has nothing over another, and something less or is the first."""
    if one is other or one.modules != other.modules:
        return False
    mine, its = (one.saved, one.peak, one.cost), (other.saved, other.peak, other.cost)
    return all(a <= b for a, b in zip(mine, its, strict=True)) and (mine != its or first)


class _Model:
    """The integer program of a problem: bytes as shares of the budget, operations of all."""

    def __init__(self, problem: Problem, peak_cost: float = 0.0) -> None:
        self.problem, self.program = problem, IntegerProgram()
        most = sum(each.size * max(k.cost for k in each.kinds) for each in problem.options)
        self.scale = max(most, 1)
        self.free = self.program.variable(peak_cost) if peak_cost else None
        """The share of the budget that is used, if that is what counts."""
        self.counts: list[list[int]] = []
        self.used: dict[tuple[int, int] | None, int] = {}
        for r, each in enumerate(problem.options):
            own = []
            for k, kind in enumerate(each.kinds):
                limit = each.size // kind.modules
                cost = kind.cost / self.scale
                own.append(self.program.variable(cost, limit, integer=True))
                self.used[r, k] = self.program.variable(integer=True)
                self.program.require({own[-1]: 1, self.used[r, k]: -limit}, most=0)
            self.counts.append(own)
            sizes = {v: k.modules for v, k in zip(own, each.kinds, strict=True)}
            self.program.require(sizes, each.size, each.size)

    def solve(self, budget: int) -> Solution | None:
        problem, program = self.problem, self.program
        before = self._before(budget)
        most = {stage: self._most(stage) / budget for stage in before}
        for place in problem.places:
            for bound in problem.bounds():
                if bound.stage not in place.flying:
                    continue
                limit = 1 - (place.rest + bound.bytes) / budget
                row: dict[int, float] = {}
                for stage, times in place.flying.items():
                    row[before[stage][-1]] = float(times - (stage == bound.stage))
                end = before[bound.stage][bound.end]
                row[end] = row.get(end, 0) + 1
                if self.free is not None:
                    row[self.free], limit = -1, limit - 1
                if bound.kind is not None:
                    # Holds only where the kind is there at all.
                    all_saved = sum(times * most[s] for s, times in place.flying.items())
                    slack = max(all_saved - limit, 0)
                    row[self.used[bound.kind]], limit = slack, limit + slack
                program.require(row, most=limit)
        return program.solve()

    def _most(self, stage: int) -> float:
        """The most bytes that a stage can save."""
        own = (each for each in self.problem.options if each.stage == stage)
        return sum(each.size * max(k.saved / k.modules for k in each.kinds) for each in own)

    def _before(self, budget: int) -> dict[int, list[int]]:
        """The variables for the sums of `Problem.before`, as shares of the budget."""
        program = self.program
        stages = {stage for place in self.problem.places for stage in place.flying}
        found = {stage: [program.variable(upper=0)] for stage in sorted(stages)}
        for each, own in zip(self.problem.options, self.counts, strict=True):
            for kind, count in zip(each.kinds, own, strict=True):
                sums = found[each.stage]
                sums.append(program.variable(upper=math.inf))
                row = {sums[-1]: 1.0, sums[-2]: -1.0, count: -kind.saved / budget}
                program.require(row, 0, 0)
        return found
