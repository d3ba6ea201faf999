"""Boundaries of stages: the best of all cuts, as trying every one of them shows."""

from __future__ import annotations

import random
from itertools import accumulate, combinations

import pytest

from meshwright.compiler.schedules.balanced import Balance, Balancer, Cuts


def balancer(
    once: list[int], each: list[int], held: list[int], sent: list[int], num_ranks: int
) -> Balancer:
    """One of pieces that cost `once`, and `each` as often as their stage is `held`."""
    sums = [[0, *accumulate(costs)] for costs in (once, each)]

    def cost(stage: int, first: int, last: int) -> int:
        own, more = (found[last] - found[first] for found in sums)
        return own + held[stage] * more

    num_stages = len(held)
    return Balancer(cost, sent, [range(r, num_stages, num_ranks) for r in range(num_ranks)])


def every_cut(found: Balancer) -> list[Cuts]:
    return list(combinations(range(1, found.num_pieces), found.num_stages - 1))


@pytest.mark.parametrize("seed", range(200))
def test_no_other_cut_is_better(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.randint(1, 10)
    num_stages = draw.randint(1, min(size, 5))
    once, each, sent = ([draw.randint(0, 6) for _ in range(size)] for _ in range(3))
    held = [num_stages - stage if seed % 2 else 0 for stage in range(num_stages)]
    found = balancer(once, each, held, sent, num_stages)

    def order(cuts: Cuts) -> tuple[int, int, int, Cuts]:
        costs = found.costs(cuts)
        squares, crossing = sum(cost**2 for cost in costs), sum(sent[cut] for cut in cuts)
        return max(costs), squares, crossing, cuts

    assert found.best() == min(every_cut(found), key=order)


@pytest.mark.parametrize("seed", range(50))
def test_with_multiple_stages_per_rank_no_stage_is_greater_and_no_rank_is_for_it(seed: int) -> None:
    draw = random.Random(seed)
    once = [draw.randint(1, 6) for _ in range(draw.randint(4, 10))]
    sent = [1] * len(once)
    looped = balancer(once, once, [0] * 4, sent, 2)
    plain = balancer(once, once, [0] * 4, sent, 4)
    greatest = max(plain.costs(plain.best()))
    assert max(looped.costs(looped.best())) == greatest
    assert max(looped.of_ranks(looped.best())) <= max(looped.of_ranks(plain.best()))


def test_equal_costs_are_cut_where_fewest_bytes_are_sent_and_then_early() -> None:
    costs = [1, 0, 0, 1]
    assert balancer(costs, costs, [0, 0], [0, 3, 1, 1], 2).best() == (2,)
    assert balancer(costs, costs, [0, 0], [0, 1, 1, 1], 2).best() == (1,)


def test_a_piece_with_nearly_everything_leaves_the_others_even() -> None:
    costs = [1] * 6 + [50]
    found = balancer(costs, costs, [0] * 4, [1] * 7, 4)
    assert found.best() == (2, 4, 6)
    assert Balance("flops", found.of_ranks(found.best())).imbalance == pytest.approx(200 / 56)


def test_an_output_head_is_weighed_with_the_layers_of_its_rank() -> None:
    costs = [1] * 8 + [6]
    found = balancer(costs, costs, [0] * 4, [1] * 9, 2)
    assert found.of_ranks(found.best()) == (7, 7)
