"""How much a statement `offload` takes: all, a fraction, or the fewest layers for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from meshwright.compiler.graph.text import size_text, size_written
from meshwright.dsl.errors import plural
from meshwright.dsl.statements import Offload
from meshwright.passes.schedule import pipeline_table
from meshwright.passes.statements.draft import Draft

SMALL_BYTES = 4096
"""The bytes on a rank below which a value stays: moving it costs more than its memory is worth."""


def share(statement: Offload, num_layers: int) -> int:
    """How many of so many layers a statement takes, but for those of a budget: any part of a layer
    is that layer."""
    if statement.budget is not None:
        return 0
    fraction = 1.0 if statement.fraction is None else statement.fraction
    return math.ceil(fraction * num_layers - 1e-9)  # 0.55 * 20 is above 11


def fewest(
    draft: Draft,
    statements: Iterable[Offload],
    most: Mapping[int, int],
    tried: Callable[[Mapping[int, int]], Draft],
) -> dict[int, int]:
    """How many layers of each stage are offloaded of those that a budget is for, which are `most`:
    the fewest with which each rank that runs it needs no more.

    Raises `PlanError` where all of them are too few.
    """
    budgets = {each.budget: each for each in statements if each.budget is not None}
    if not budgets:
        return {}
    budget, statement = min(budgets.items())
    if len(budgets) > 1:
        raise draft.plan.error(
            "P301", "two budgets are for the same device", budgets.values(), help="keep one of them"
        )
    low, high = dict.fromkeys(most, 0), dict(most)
    lines = {number: _Line() for number in most}
    needed: dict[tuple[tuple[int, int], ...], int] = {}
    while low != high:
        middle = {n: lines[n].crossing(budget, low[n], high[n]) for n in low}
        peaks = _peaks(tried(middle))
        needed[tuple(middle.items())] = max(peaks.values())
        for number, count in middle.items():
            lines[number].peaks[count] = peaks[number]
            if peaks[number] <= budget:
                high[number] = count
            elif low[number] < high[number]:
                low[number] = count + 1
    found = tuple(high.items())
    most_needed = needed.get(found) or max(_peaks(tried(high)).values())
    if most_needed > budget:
        raise draft.plan.error(
            "P501",
            f"a rank needs {size_text(most_needed)} with the {statement.what} of "
            f"{plural(sum(high.values()), 'layer')} offloaded, and the budget is "
            f"{size_text(budget)}",
            statement.at("budget"),
            help=f"write `budget={size_written(most_needed, up=True)}` or more, select more "
            "modules, or add `checkpoint` or `zero`",
        )
    return high


@dataclass
class _Line:
    """The bytes that a rank needs by the number of layers that are offloaded, as far as tried."""

    peaks: dict[int, int] = field(default_factory=dict)

    def crossing(self, budget: int, low: int, high: int) -> int:
        """Where in `low` to `high - 1` to try next: each layer saves as much as another, but at the
        ends, so it is on the line through the nearest two. Every third try halves what is left,
        whatever the line says."""
        middle = (low + high) // 2
        if low == high or len(self.peaks) < 2 or len(self.peaks) % 3 == 1:
            return middle
        (one, here), (two, there) = sorted(
            sorted(self.peaks.items(), key=lambda tried: abs(tried[1] - budget))[:2]
        )
        if here <= there:
            return middle
        found = one + math.ceil((here - budget) * (two - one) / (here - there))
        return min(max(found, low), high - 1)


def _peaks(draft: Draft) -> dict[int, int]:
    """By stage: the bytes that a rank needs which runs it."""
    assert draft.price is not None
    memories, table = draft.price(draft), pipeline_table(draft)
    return {
        each.number: max(
            memories[place].peak for place in (table.holders[each.number] if table else [0])
        )
        for each in draft.stages
    }
