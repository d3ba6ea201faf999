"""Tokens in slots and back, on one rank, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshwright.compiler.kernels.experts import (
    combine,
    combine_weight,
    dispatch,
    positions,
    top,
)

GROUPS, TOKENS, CHOICES, SLOTS, WIDTH = 3, 5, 2, 12, 4


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, slots of which some choices have none, weights, and what is in the slots."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(SLOTS, generator=generator) for _ in range(GROUPS)]
    slot = torch.stack(orders)[:, : TOKENS * CHOICES].view(GROUPS, TOKENS, CHOICES)
    slot[0, 2, 0] = slot[1, 3] = slot[2, :, 1] = -1
    shapes = ((TOKENS, WIDTH), (TOKENS, CHOICES), (SLOTS, WIDTH))
    made = (torch.randn(GROUPS, *s, generator=generator, dtype=torch.float64) for s in shapes)
    x, weight, y = made
    return x, slot, weight, y


def assigned(slot: Tensor) -> list[tuple[int, int, int, int]]:
    """Group, token, choice and slot of each choice that was not dropped."""
    found = [(*place.tolist(), int(slot[tuple(place)])) for place in (slot >= 0).nonzero()]
    return [(g, s, k, n) for g, s, k, n in found]


@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_are_in_their_slots_and_others_are_zero(weighted: bool) -> None:
    x, slot, weight, _ = example()
    expected = torch.zeros(GROUPS, SLOTS, WIDTH, dtype=torch.float64)
    for g, s, k, n in assigned(slot):
        expected[g, n] = x[g, s] * (weight[g, s, k] if weighted else 1)
    # What is not a number has to stay where it is.
    x[0, 2], weight[0, 2, 0] = torch.nan, torch.nan
    expected[0, slot[0, 2, 1]] = torch.nan
    torch.testing.assert_close(
        dispatch(x, slot, weight if weighted else None, SLOTS), expected, equal_nan=True
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_are_sums_of_their_slots(weighted: bool) -> None:
    _, slot, weight, y = example()
    expected = torch.zeros(GROUPS, TOKENS, WIDTH, dtype=torch.float64)
    for g, s, k, n in assigned(slot):
        expected[g, s] += y[g, n] * (weight[g, s, k] if weighted else 1)
    y[0, 0] = y[0, 0].where((slot[0] == 0).any(), torch.nan)
    torch.testing.assert_close(combine(y, slot, weight if weighted else None), expected)


def test_weights_move_by_the_products_of_tokens_with_their_slots() -> None:
    grad, slot, weight, y = example()
    expected = torch.zeros_like(weight)
    for g, s, k, n in assigned(slot):
        expected[g, s, k] = grad[g, s] @ y[g, n]
    torch.testing.assert_close(combine_weight(grad, y, slot), expected)


def test_results_have_the_type_of_what_is_moved() -> None:
    x, slot, weight, y = (each.float() if each.is_floating_point() else each for each in example())
    assert dispatch(x.bfloat16(), slot, weight, SLOTS).dtype == torch.bfloat16
    assert combine(y.bfloat16(), slot, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("count", [1, 3, 8, 9, 12])
def test_the_largest_come_first_and_of_equal_ones_the_first(count: int) -> None:
    scores = torch.randint(0, 4, (6, 12), generator=torch.Generator().manual_seed(1)).double()
    scores[0] = 0
    scores[1, 3] = -torch.inf
    for row, found in zip(scores.tolist(), top(scores, count).tolist(), strict=True):
        assert found == sorted(range(12), key=lambda i: (-row[i], i))[:count]


def test_positions_count_the_equal_entries_before_each() -> None:
    expert = torch.randint(0, 4, (2, 3, 20), generator=torch.Generator().manual_seed(1))
    for row, found in zip(
        expert.flatten(0, 1).tolist(), positions(expert).flatten(0, 1), strict=True
    ):
        assert found.tolist() == [row[:place].count(each) for place, each in enumerate(row)]
