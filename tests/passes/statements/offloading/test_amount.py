"""How many layers a statement `offload` takes for a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

import meshwright as mw
from meshwright.dsl.statements import Offload
from meshwright.passes.statements.offloading import amount

NEEDED: dict[str, Callable[[int], int]] = {
    "a line": lambda count: 1000 - 2 * count,
    "a line that ends": lambda count: max(1000 - 7 * count, 400),
    "a step": lambda count: 900 if count < 37 else 100,
    "a bend": lambda count: 1000 - count - 20 * max(count - 300, 0),
}


def found(needed: Callable[[int], int], budget: int, most: int) -> tuple[int, int]:
    """How many layers are taken, and how many numbers of layers were tried."""
    tries: list[int] = []

    def price(draft: Any) -> dict[int, Any]:
        tries.append(draft.count)
        return {0: SimpleNamespace(peak=needed(draft.count))}

    def tried(counts: Mapping[int, int]) -> Any:
        plan = mw.Plan.parse("mesh one=1")
        stages = (SimpleNamespace(number=0),)
        return SimpleNamespace(price=price, plan=plan, stages=stages, count=counts[0])

    (statement,) = mw.Plan.parse(f"mesh one=1\noffload optimizer budget={budget}B").of(Offload)
    return amount.fewest(tried({0: 0}), [statement], {0: most}, tried)[0], len(tries)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("budget", [401, 500, 899, 950, 999])
def test_a_budget_takes_the_fewest_of_many_layers(name: str, budget: int) -> None:
    needed = NEEDED[name]
    fewest = next(count for count in range(401) if needed(count) <= budget)
    assert found(needed, budget, 400)[0] == fewest


def test_where_each_layer_saves_as_much_few_numbers_are_tried() -> None:
    assert all(found(NEEDED["a line"], budget, 400)[1] <= 5 for budget in range(201, 999, 61))
