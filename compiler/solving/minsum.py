"""Minimise a sum of tables: each gives a cost for every combination of choices of a few variables.

Variables are eliminated one by one, each into one table over what it stood beside in others; the
one that leaves the smallest table goes first. That is exact, and takes time that grows with the
widest table: the graphs of models are narrow. Equal steps, as in the layers of a model, are worked
out once: tables are compared by what is in them, less a constant. What would be wider than `LIMIT`
is left to an integer program, which may end before it has proved that nothing costs less.

Costs are whole numbers, so that sums are exact and equal ones are equal; infinite where a
combination is not allowed. Those that are complex count by their real part first, and by their
imaginary part where that is equal: as numpy compares them.

Source: bucket elimination, Dechter 1999.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from meshwright.compiler.solving.integer import TOLERANCE, IntegerProgram

Costs: TypeAlias = NDArray[np.inexact[Any]]
Cost: TypeAlias = float | complex

LIMIT = 1 << 13
"""The most entries of a table that is made."""
NODES = 20_000
"""Where the search for something better by an integer program ends. A limit in seconds would let
ranks decide apart."""


@dataclass(frozen=True, slots=True)
class Table:
    """The cost of every combination of choices of the variables in `scope`, one dim for each."""

    scope: tuple[int, ...]
    costs: Costs


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice for every variable, and their cost; none cost less than `bound`."""

    choices: tuple[int, ...]
    cost: Cost
    bound: Cost

    @property
    def is_optimal(self) -> bool:
        """Whether none cost less."""
        return self.bound == self.cost


class Infeasible(Exception):
    """No combination is allowed, of the choices of `variables` alone."""

    def __init__(self, variables: frozenset[int]) -> None:
        super().__init__(variables)
        self.variables = variables


def minimise(sizes: Sequence[int], tables: Iterable[Table], limit: int = LIMIT) -> Solution:
    """The cheapest choices for variables that have so many each.

    Raises `Infeasible` where every combination costs infinitely much.
    """
    left = _Elimination(sizes, tables)
    left.run(limit)
    if not left.is_done:
        narrowed = _narrowed(sizes, left.given)
        if narrowed is not None:
            try:
                return narrowed.solved(limit)
            except Infeasible:
                pass
    choices, bound = left.remaining()
    return left.solution(choices, bound)


class Margins:
    """What another choice for one variable would cost more, where those that are `free` follow it
    and all others are as in `choices`."""

    def __init__(
        self, tables: Iterable[Table], choices: Sequence[int], free: Iterable[int] = ()
    ) -> None:
        self.choices, self.free = choices, frozenset(free)
        self._of: defaultdict[int, list[Table]] = defaultdict(list)
        for table in tables:
            for variable in table.scope:
                self._of[variable].append(table)

    def of(self, variable: int, size: int) -> list[Cost]:
        """By each of so many choices of a variable; no free one is beside another."""
        total: Costs = np.zeros(size, dtype=complex)
        free: defaultdict[int, Costs] = defaultdict(lambda: np.zeros((size, 1), dtype=complex))
        for table in self._of[variable]:
            beside = [v for v in table.scope if v in self.free]
            costs = self._costs(table, (variable, *beside))
            if beside:
                free[beside[0]] = free[beside[0]] + costs
            else:
                total = total + costs
        for other, costs in free.items():
            for table in self._of[other]:
                if variable not in table.scope:
                    costs = costs + self._costs(table, (other,))
            total = total + costs.min(1)
        return [cost.item() for cost in total - total[self.choices[variable]]]

    def _costs(self, table: Table, scope: tuple[int, ...]) -> Costs:
        """A table over the variables of `scope` alone."""
        at = tuple(slice(None) if v in scope else self.choices[v] for v in table.scope)
        order = [v for v in table.scope if v in scope]
        return table.costs[at].transpose([order.index(v) for v in scope])


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A table that is part of the sum, and the number of what is in it."""

    scope: tuple[int, ...]
    number: int
    costs: Costs
    made_of: tuple[_Held, ...] = ()
    """The tables that have gone into it."""


@dataclass(frozen=True, slots=True)
class _Step:
    """An eliminated variable, and its best choice by those of the variables in `scope`."""

    variable: int
    scope: tuple[int, ...]
    best: NDArray[np.intp]


class _Elimination:
    """The sum, of which variables are eliminated; `constant` is no longer in any table."""

    def __init__(self, sizes: Sequence[int], tables: Iterable[Table]) -> None:
        self.sizes, self.given = sizes, tuple(tables)
        self.constant: Cost = 0.0
        self.steps: list[_Step] = []
        self.of: defaultdict[int, dict[_Held, None]] = defaultdict(dict)
        """The tables that each variable is in."""
        self._known: dict[tuple[tuple[int, ...], bytes], tuple[int, Costs]] = {}
        self._summed: dict[object, tuple[Costs, NDArray[np.intp]]] = {}
        for table in self.given:
            # What leaves no choice is no variable: arrays have a limited number of dims.
            if np.isinf(table.costs.min()):
                raise Infeasible(frozenset(table.scope))
            scope = tuple(v for v in table.scope if sizes[v] > 1)
            self._add(scope, table.costs.reshape([sizes[v] for v in scope]))

    def run(self, limit: int) -> None:
        """Eliminate every variable that this can be done to within `limit`."""
        waiting = [(self._width(v), v) for v in range(len(self.sizes))]
        heapq.heapify(waiting)
        gone: set[int] = set()
        while waiting:
            width, variable = heapq.heappop(waiting)
            if variable in gone or width > limit:
                continue
            now = self._width(variable)
            if now != width:
                heapq.heappush(waiting, (now, variable))
                continue
            gone.add(variable)
            beside = self._eliminate(variable)
            for each in beside:
                heapq.heappush(waiting, (self._width(each), each))

    @property
    def is_done(self) -> bool:
        """Whether all variables are eliminated."""
        return not any(self.of.values())

    def solution(self, choices: Mapping[int, int], bound: Cost | None) -> Solution:
        """The choices for all variables, by those for what is not eliminated and its `bound`."""
        taken = dict(choices)
        for step in reversed(self.steps):
            taken[step.variable] = int(step.best[tuple(taken[v] for v in step.scope)])
        found = tuple(taken.get(v, 0) for v in range(len(self.sizes)))
        cost = _total(self.given, found)
        return Solution(found, cost, cost if bound is None else self.constant + bound)

    def remaining(self) -> tuple[dict[int, int], Cost | None]:
        """Choices for what could not be eliminated, by an integer program, and a bound on what they
        cost; None where there is nothing."""
        tables = list(dict.fromkeys(table for held in self.of.values() for table in held))
        variables = sorted({v for table in tables for v in table.scope})
        if not variables:
            return {}, None
        rest = _Rest({v: self.sizes[v] for v in variables}, tables)
        choices, bound = rest.solved(np.real)
        if not any(np.iscomplexobj(table.costs) for table in tables):
            return choices, bound
        first = sum(t.costs[tuple(choices[v] for v in t.scope)].item().real for t in tables)
        choices, second = rest.solved(np.imag, first)
        # Where less may be possible in the real part, nothing is known of the imaginary part.
        return choices, complex(first, second) if bound == first else complex(bound, -math.inf)

    def _add(self, scope: tuple[int, ...], costs: Costs, made_of: tuple[_Held, ...] = ()) -> None:
        """Add a table to the sum, its least entry as a constant."""
        least = costs.min().item()
        if np.isinf(least):
            raise Infeasible(_variables(made_of) | set(scope))
        self.constant += least
        if not scope:
            return
        # What is not allowed looks the same, whatever the constant.
        costs = np.where(np.isinf(costs), math.inf, costs - least)
        key = costs.shape, costs.tobytes()
        number, costs = self._known.setdefault(key, (len(self._known), costs))
        table = _Held(scope, number, costs, made_of)
        for variable in scope:
            self.of[variable][table] = None

    def _scope(self, variable: int) -> tuple[int, ...]:
        """The variables beside one, and itself as the last."""
        beside = dict.fromkeys(v for table in self.of[variable] for v in table.scope)
        beside.pop(variable, None)
        return (*beside, variable)

    def _width(self, variable: int) -> int:
        return math.prod(self.sizes[v] for v in self._scope(variable))

    def _eliminate(self, variable: int) -> tuple[int, ...]:
        """Replace the tables of a variable by one over those beside it, which are returned."""
        scope, tables = self._scope(variable), tuple(self.of.pop(variable, ()))
        place = {v: i for i, v in enumerate(scope)}
        placed = tuple((table.number, tuple(place[v] for v in table.scope)) for table in tables)
        key = tuple(self.sizes[v] for v in scope), placed
        if key not in self._summed:
            self._summed[key] = _minimum(
                key[0],
                [(table.costs, dims) for table, (_, dims) in zip(tables, placed, strict=True)],
            )
        costs, best = self._summed[key]
        for table in tables:
            for v in scope[:-1]:
                self.of[v].pop(table, None)
        self.steps.append(_Step(variable, scope[:-1], best))
        self._add(scope[:-1], costs, tables)
        return scope[:-1]


@dataclass(frozen=True)
class _Narrowed:
    """A sum with some of the `choices` of its variables alone."""

    choices: Sequence[NDArray[np.intp]]
    tables: Sequence[Table]
    given: Sequence[Table]
    least: float
    """The real part of every cost; those of `tables` are the imaginary parts."""

    def solved(self, limit: int) -> Solution:
        """The cheapest of these choices."""
        found = minimise([len(own) for own in self.choices], self.tables, limit)
        choices = tuple(int(self.choices[v][i]) for v, i in enumerate(found.choices))
        return Solution(choices, _total(self.given, choices), complex(self.least, found.bound.real))


def _narrowed(sizes: Sequence[int], tables: Sequence[Table]) -> _Narrowed | None:
    """The choices with which the real part of every table can be at its least: what can be made of
    these costs less than all else. None if there is certainly nothing, or no real part."""
    if not any(np.iscomplexobj(table.costs) for table in tables):
        return None
    leasts = [float(table.costs.real.min()) for table in tables]
    costs = [
        np.where(table.costs.real > least, math.inf, table.costs.imag)
        for table, least in zip(tables, leasts, strict=True)
    ]
    choices = [np.arange(size) for size in sizes]
    of: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, table in enumerate(tables):
        for dim, variable in enumerate(table.scope):
            of[variable].append((number, dim))
    waiting = dict.fromkeys(range(len(sizes)))
    while waiting:
        variable = waiting.popitem()[0]
        allowed = np.ones(len(choices[variable]), dtype=bool)
        for number, dim in of[variable]:
            others = tuple(d for d in range(costs[number].ndim) if d != dim)
            allowed &= costs[number].min(others) < math.inf
        if not allowed.any():
            return None
        if not allowed.all():
            choices[variable] = choices[variable][allowed]
            for number, dim in of[variable]:
                costs[number] = costs[number].compress(allowed, dim)
                waiting.update(dict.fromkeys(tables[number].scope))
    found = [Table(t.scope, own) for t, own in zip(tables, costs, strict=True)]
    return _Narrowed(choices, found, tables, sum(leasts))


def _total(tables: Iterable[Table], choices: Sequence[int]) -> Cost:
    """What a choice for every variable costs."""
    total: Cost = sum(
        table.costs[tuple(choices[v] for v in table.scope)].item() for table in tables
    )
    return total


def _variables(tables: Iterable[_Held]) -> frozenset[int]:
    """All that have gone into these tables."""
    pending, found = [*tables], set[int]()
    while pending:
        table = pending.pop()
        found.update(table.scope)
        pending += table.made_of
    return frozenset(found)


def _minimum(
    sizes: tuple[int, ...], tables: Sequence[tuple[Costs, tuple[int, ...]]]
) -> tuple[Costs, NDArray[np.intp]]:
    """The least of a sum of tables over the last of the dims, and where it is; each table comes
    with the dims that it has."""
    total: Costs = np.zeros(sizes)
    for costs, dims in tables:
        order = sorted(range(len(dims)), key=dims.__getitem__)
        shape = [1] * len(sizes)
        for dim in dims:
            shape[dim] = sizes[dim]
        total = total + costs.transpose(order).reshape(shape)
    return total.min(-1), total.argmin(-1)


class _Rest:
    """What is left of a sum, as an integer program."""

    def __init__(self, sizes: Mapping[int, int], tables: Sequence[_Held]) -> None:
        self.sizes, self.tables = sizes, tables

    def solved(
        self, part: Callable[[Any], Any], first: float | None = None
    ) -> tuple[dict[int, int], float]:
        """The choices that cost least in a `part` of costs, and a bound on it; where `first` is
        given, of those whose real part is that."""
        program = IntegerProgram()
        taken = {
            v: [program.variable(integer=True) for _ in range(size)]
            for v, size in self.sizes.items()
        }
        for own in taken.values():
            program.require(dict.fromkeys(own, 1.0), 1.0, 1.0)
        real: dict[int, float] = {}
        for table in self.tables:
            real.update(_tabulate(program, table, taken, part))
        if first is not None:
            program.require(real, most=first)
        # If nothing is found within the limit, any combination will do.
        found = program.solve(gap=0.0, most_nodes=NODES) or program.solve(gap=1.0, most_nodes=None)
        if found is None:
            raise Infeasible(_variables(self.tables))
        choices = {
            v: max(range(len(own)), key=lambda i: found.values[own[i]]) for v, own in taken.items()
        }
        # Costs are whole numbers.
        return choices, math.ceil(found.bound - TOLERANCE * max(1.0, abs(found.bound) * 1e-6))


def _tabulate(
    program: IntegerProgram,
    table: _Held,
    taken: Mapping[int, Sequence[int]],
    part: Callable[[Any], Any],
) -> dict[int, float]:
    """Add a `part` of a table's costs: a share of each combination, whose sums are what is taken.
    Returns the real part of the cost of each share."""
    allowed = [(at, cost.item()) for at, cost in np.ndenumerate(table.costs) if not np.isinf(cost)]
    shares = {at: program.variable(float(part(cost))) for at, cost in allowed}
    for dim, variable in enumerate(table.scope):
        sums: list[dict[int, float]] = [{own: -1.0} for own in taken[variable]]
        for at, share in shares.items():
            sums[at[dim]][share] = 1.0
        for terms in sums:
            program.require(terms, 0.0, 0.0)
    return {shares[at]: cost.real for at, cost in allowed if cost.real}
