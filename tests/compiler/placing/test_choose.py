"""The placements that are chosen cost least of all combinations."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.choose import Contradiction, choose
from tests.compiler.layouts import split
from tests.compiler.placing.exhaustive import Exhaustive, TooMany
from tests.compiler.placing.random_graphs import Drawer, Problem, drawn


def check_least(problem: Problem) -> None:
    """Assert that what is chosen costs what it says, and that no combination costs less."""
    candidates = problem.candidates()
    every = Exhaustive(problem, candidates)
    nothing = math.inf, math.inf
    try:
        choice = choose(candidates, problem.ends, problem.is_unasked)
    except Contradiction:
        assert every.least(nothing) == nothing
        return
    found = complex(choice.solution.cost)
    assert choice.solution.is_optimal
    assert every.total(choice.placements) == (found.real, found.imag)
    assert every.least((found.real, found.imag)) == (found.real, found.imag)


@pytest.mark.parametrize("seed", range(40))
def test_no_combination_of_placements_costs_less_than_the_one_chosen(seed: int) -> None:
    check_least(drawn(seed, most=5))


def test_what_is_wanted_at_the_end_is_made_once_for_that_and_for_users_in_its_stage() -> None:
    draw = Drawer(random.Random(0), Mesh((("a", 2),)), stage=1)
    x = draw.argument((8, 8))
    draw.fixed[x] = split((8, 8), {0: "a"})
    draw.call(torch.ops.aten.relu.default, x)
    draw.call(torch.ops.aten.tril.default, draw.values[-1])
    problem = draw.problem()
    _, value, user = draw.values
    problem.ends = {value: [replicated((8, 8))]}
    alone = least_of(problem)
    problem.ends[user] = [replicated((8, 8))]
    assert least_of(problem) == alone
    check_least(problem)


def test_values_that_are_used_in_other_stages_are_not_alike() -> None:
    """One use here of three in all, and both of two: the same calls in the same order."""
    draw = Drawer(random.Random(0), Mesh((("a", 2),)))
    x = draw.weight(8, 8)
    draw.fixed[x] = split((8, 8), {0: "a"})
    for stages in ((0, 1, 1), (0, 0)):
        draw.stage = 0
        draw.call(torch.ops.aten.relu.default, x)
        value = draw.values[-1]
        for draw.stage in stages:
            draw.call(torch.ops.aten.neg.default, value)
    problem = replace(draw.problem(), unasked=frozenset())
    rows, columns = split((8, 8), {0: "a"}), split((8, 8), {1: "a"})
    _, _, *first, _, third, fourth = draw.values
    problem.ends = {first[0]: [rows], third: [rows], fourth: [columns]}
    choice = choose(problem.candidates(), problem.ends, alike=lambda user: None)
    every = Exhaustive(problem, problem.candidates())
    assert every.total(choice.placements) == (choice.solution.cost.real, choice.solution.cost.imag)


def least_of(problem: Problem) -> complex:
    return choose(problem.candidates(), problem.ends).solution.cost


@pytest.mark.slow
@pytest.mark.parametrize("group", range(10))
def test_no_combination_costs_less_in_larger_graphs(group: int) -> None:
    """Of 50 graphs, in the place of each of which another is drawn if it has too many."""
    compared = 0
    for seed in range(1000 + 100 * group, 1100 + 100 * group):
        with suppress(TooMany):
            check_least(drawn(seed, most=10))
            compared += 1
        if compared == 50:
            return
    raise AssertionError(f"no more than {compared} graphs have few enough combinations")


def test_what_can_not_be_had_together_is_named() -> None:
    draw = Drawer(random.Random(0), Mesh((("a", 2),)))
    x = draw.weight(8, 8)
    draw.fixed[x] = replicated((8, 8)).add_varying(("a",))
    draw.call(torch.ops.aten.relu.default, x)
    problem = draw.problem()
    value = draw.values[-1]
    problem.ends = {value: [replicated((8, 8))]}
    with pytest.raises(Contradiction, match="no layouts of `relu`") as caught:
        choose(problem.candidates(), problem.ends)
    assert value in caught.value.nodes
