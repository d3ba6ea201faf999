"""What a schedule looks like in a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from meshwright.compiler.report.pipeline import print_schedule, schedule_text
from meshwright.compiler.schedules.named import NAMED
from meshwright.compiler.schedules.simulate import Costs
from meshwright.compiler.schedules.tables import Size

Golden = Callable[[str, str], None]
TABLES = {"1f1b": Size(2, 4), "zb": Size(4, 6), "dualpipe": Size(2, 4)}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_and_its_timeline_have_golden_texts(name: str, golden: Golden) -> None:
    table = NAMED[name].fill(TABLES[name])
    timeline = schedule_text(table, Costs.equal(len(table.holders)))
    golden(f"schedule-{name}", f"{schedule_text(table)}\n\n{timeline}")


def test_what_costs_more_is_drawn_longer(golden: Golden) -> None:
    table = NAMED["1f1b"].fill(Size(2, 2))
    golden("schedule-uneven", schedule_text(table, Costs([1, 2.5], [1.5, 2], [1, 0.75], hop=0.25)))


@pytest.mark.parametrize("weight", [0, 1e-6, 1e6])
def test_extreme_costs_are_drawn_within_bounds(weight: float) -> None:
    table = NAMED["zb"].fill(Size(4, 8))
    text = schedule_text(table, Costs([1] * 4, [1] * 4, [weight] * 4))
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 80


def test_every_row_is_printed_whole_and_as_long_as_the_others() -> None:
    table = NAMED["interleaved"].fill(Size(4, 8, 2))
    console = Console(file=io.StringIO(), width=50, color_system=None)
    print_schedule(table, Costs.equal(8), console=console)
    assert isinstance(console.file, io.StringIO)
    rows = [line for line in console.file.getvalue().splitlines() if line.startswith("rank")]
    drawn = ["".join(row[8:] for row in rows[c::4]) for c in range(4)]
    assert len(set(map(len, drawn))) == 1
    for c in range(4):
        assert sum(drawn[c].count(f"{stage}F") for stage in (c, c + 4)) == 16
