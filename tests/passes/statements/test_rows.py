"""The pass `rows`: linears are split by input features."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import meshwright
from meshwright import PlanError
from meshwright.passes.statements import rows
from tests.passes.examples import Mlp
from tests.passes.examples import rows as batch
from tests.passes.stages import check_documented, shown, stages

PLAN = "mesh tp=2\ncolumns up over tp\nrows down over tp\n"


def test_the_docstring_shows_a_linear_before_and_after() -> None:
    found = stages(Mlp(), batch(), PLAN)
    check_documented(
        rows,
        shown(found["normalise"], "down_weight", "linear_1"),
        shown(found["partition"], "down_weight", "linear_1", "all_reduce", "add"),
    )


def test_row_parallel_linear_ends_in_one_all_reduce() -> None:
    program = meshwright.compile(Mlp(), meshwright.Plan.parse(PLAN), example=batch())
    assert program.comm().under("down").counts() == {"all_reduce[tp]": 1}


def test_a_whole_input_is_sliced_for_it() -> None:
    found = stages(Mlp(), batch(), "mesh tp=2\nrows up over tp\n")
    assert shown(found["partition"], "slice", "linear") == [
        "slice: f32[8, 16@tp] = slice(x, tp)",
        "linear: f32[8, 64] partial(tp) = linear(slice, up_weight)",
    ]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("rows-does-not-divide", "mesh tp=3\nrows down over tp\n"),
        ("rows-twice", "mesh a=2, b=2\nrows dow* over a\nrows *own over b\n"),
    ],
)
def test_mistakes_are_explained(name: str, plan: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Mlp(), meshwright.Plan.parse(plan), example=batch())
    golden(name, str(caught.value))
