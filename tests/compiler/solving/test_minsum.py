"""Sums of tables at their least."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meshwright.compiler.solving.integer import IntegerProgram
from meshwright.compiler.solving.minsum import Infeasible, Margins, Table, minimise


def drawn(rng: random.Random, variables: int) -> tuple[list[int], list[Table]]:
    """Sizes of variables and tables over one to three of them, some entries infinite."""
    sizes = [rng.randint(1, 4) for _ in range(variables)]
    tables: list[Table] = []
    for _ in range(rng.randint(1, 2 * variables)):
        scope = tuple(rng.sample(range(variables), rng.randint(0, min(3, variables))))
        shape = [sizes[v] for v in scope]
        costs = [
            math.inf if rng.random() < 0.1 else rng.randint(-9, 9) for _ in range(math.prod(shape))
        ]
        found = np.array(costs, float).reshape(shape)
        # Some tables are the same, over the same variables in another order, or over others.
        same = [each.costs for each in tables if each.costs.shape == found.shape]
        tables.append(Table(scope, rng.choice(same) if same and rng.random() < 0.5 else found))
    return sizes, tables


def in_order(rng: random.Random, tables: list[Table]) -> list[Table]:
    """The same tables, of which some also cost something that counts before all else."""
    found = []
    for table in tables:
        first = np.array([rng.choice((0.0, 0.0, 1.0)) for _ in range(table.costs.size)])
        second = np.where(np.isinf(table.costs), 0.0, table.costs)
        costs = first.reshape(table.costs.shape) + 1j * second
        found.append(Table(table.scope, np.where(np.isinf(table.costs), math.inf, costs)))
    return found


def least(sizes: list[int], tables: list[Table]) -> complex:
    """By trying all."""
    costs = (
        sum(complex(table.costs[tuple(choice[v] for v in table.scope)]) for table in tables)
        for choice in itertools.product(*map(range, sizes))
    )
    return min(costs, key=lambda cost: (cost.real, cost.imag))


@pytest.mark.parametrize("limit", [1 << 20, 16, 0])
def test_what_is_found_is_the_least_of_all(limit: int) -> None:
    """With all variables eliminated, with some of them, and with none."""
    rng = random.Random(limit)
    for _ in range(40 if limit < 20 else 200):
        sizes, tables = drawn(rng, rng.randint(1, 6))
        expected = least(sizes, tables)
        if math.isinf(expected.real):
            with pytest.raises(Infeasible):
                minimise(sizes, tables, limit)
            continue
        found = minimise(sizes, tables, limit)
        assert found.cost == found.bound == expected


@pytest.mark.parametrize("limit", [1 << 20, 8, 0])
def test_the_real_part_counts_first(limit: int) -> None:
    rng = random.Random(limit)
    for _ in range(30):
        sizes, tables = drawn(rng, rng.randint(1, 5))
        tables = in_order(rng, tables)
        expected = least(sizes, tables)
        if math.isinf(expected.real):
            with pytest.raises(Infeasible):
                minimise(sizes, tables, limit)
            continue
        found = minimise(sizes, tables, limit)
        assert found.cost == found.bound == expected


def test_what_is_not_proved_to_be_the_least_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The integer program ends with the first combination that it finds."""
    solve = IntegerProgram.solve
    monkeypatch.setattr(
        IntegerProgram, "solve", lambda self, gap, most_nodes: early(solve(self, gap=0.0))
    )
    sizes, tables = [2, 2], [Table((0, 1), np.array([[3.0, 5.0], [4.0, 6.0]]))]
    found = minimise(sizes, tables, 0)
    assert not found.is_optimal
    assert (found.cost, found.bound) == (3, 2)


def early(found: Any) -> Any:
    """As if the bound had not come up to the cost."""
    return replace(found, bound=found.bound - 1)


def test_equal_tables_over_variables_in_another_order_are_another_step() -> None:
    costs = np.array([[5.0, 0.0], [1.0, 7.0]])
    found = minimise([2, 2, 2, 2], [Table((0, 1), costs), Table((3, 2), costs)])
    assert (found.cost, found.choices) == (0, (0, 1, 1, 0))


def test_margins_are_what_another_choice_costs_where_free_variables_follow_it() -> None:
    rng, compared = random.Random(7), 0
    for _ in range(60):
        sizes, tables = drawn(rng, rng.randint(2, 5))
        tables = [each for each in tables if len(each.scope) < 3]
        free = rng.randrange(len(sizes))
        try:
            choices = list(minimise(sizes, tables).choices)
        except Infeasible:
            continue
        margins, first = Margins(tables, choices, [free]), least_with(sizes, tables, choices, free)
        for variable in set(range(len(sizes))) - {free}:
            found = margins.of(variable, sizes[variable])
            for option, margin in enumerate(found):
                changed = [*choices]
                changed[variable] = option
                cost = least_with(sizes, tables, changed, free)
                # What no choice of the others allows is not allowed in a table of its own either.
                assert margin == cost - first or math.isinf(cost.real)
                compared += not math.isinf(cost.real) and option != choices[variable]
    assert compared > 100


def least_with(sizes: list[int], tables: list[Table], choices: list[int], free: int) -> complex:
    """What choices cost, with the best for one variable."""
    only = [[own] for own in choices]
    only[free] = [*range(sizes[free])]
    costs = (
        sum(complex(table.costs[tuple(choice[v] for v in table.scope)]) for table in tables)
        for choice in itertools.product(*only)
    )
    return min(costs, key=lambda cost: (cost.real, cost.imag))
