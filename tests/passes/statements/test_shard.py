"""The pass `shard`: layouts written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright import PlanError
from meshwright.passes.statements import shard
from tests.passes.examples import Mlp, rows
from tests.passes.stages import check_documented, shown, stages


def test_the_docstring_shows_a_parameter_before_and_after() -> None:
    found = stages(Mlp(), rows(), "mesh tp=2\nshard up.weight [f@tp, d]\n")
    check_documented(
        shard, shown(found["normalise"], "up_weight"), shown(found["partition"], "up_weight")
    )


def test_shard_takes_the_place_of_columns_for_what_it_names() -> None:
    plan = "mesh a=2, b=2\ncolumns up over a\nshard up.weight [f@(a, b), d]\nshard up.bias [f]\n"
    found = stages(Mlp(), rows(), plan)
    assert shown(found["partition"], "up_weight", "up_bias") == [
        "up_weight: f32[64@(a, b), 16] = input(parameter up.weight)",
        "up_bias: f32[64] = input(parameter up.bias)",
    ]


def test_the_output_and_the_input_of_a_module_may_be_laid_out() -> None:
    plan = "mesh dp=2, tp=2\nshard up -> [b@dp, f@tp]\nshard down <- [b@dp, f]\n"
    found = stages(Mlp(), rows(), plan)
    assert shown(found["partition"], "linear", "linear_1") == [
        "linear: f32[8@dp, 64@tp] = linear(slice, vary, vary_1)",
        "linear_1: f32[8@dp, 16] = linear(all_gather_replicated, vary_2, vary_3)",
    ]


class Marked(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(meshwright.layout(self.up(x), "[b, nn@tp nn]"))).sum()


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("shard-number-of-dims", "mesh tp=2\nshard up.weight [f@tp]\n"),
        ("shard-does-not-divide", "mesh tp=3\nshard up.weight [f@tp, d]\n"),
        ("shard-unknown-axis", "mesh tp=2\nshard up.weight [f@dp, d]\n"),
        ("shard-no-such-module", "mesh tp=2\nshard upp -> [b, f@tp]\n"),
        ("shard-tie", "mesh tp=2\nshard *.weight [f@tp, d]\nshard up.* [f, d@tp]\n"),
    ],
)
def test_mistakes_are_explained(name: str, plan: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Mlp(), meshwright.Plan.parse(plan), example=rows())
    golden(name, str(caught.value))


class Constants(nn.Module):
    """Modules that take no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList(Row() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, *(row() for row in self.rows)]).sum()


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 16))

    def forward(self) -> Tensor:
        return self.weight * 2


def test_of_multiple_modules_that_no_tensor_enters_the_first_is_named() -> None:
    plan = meshwright.Plan.parse("mesh tp=2\nshard rows.* <- [b, f@tp]\n")
    with pytest.raises(PlanError, match=r"no tensor enters `rows\.0`"):
        meshwright.compile(Constants(), plan, example=rows())


def test_a_mistake_in_a_mark_names_its_line(golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Marked(), meshwright.Plan.parse("mesh tp=2\n"), example=rows())
    assert "test_shard.py" in str(caught.value)
