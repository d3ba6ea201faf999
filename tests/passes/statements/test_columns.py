"""The pass `columns`: linears are split by output features."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright import PlanError
from meshwright.passes.statements import columns
from tests.equivalence import check_equal
from tests.models import real
from tests.passes.examples import Blocks, Mlp, rows, sequences
from tests.passes.stages import check_documented, shown, stages


def test_the_docstring_shows_a_linear_before_and_after() -> None:
    found = stages(Mlp(), rows(), "mesh tp=2\ncolumns up over tp\nrows down over tp\n")
    names = "up_weight", "up_bias", "linear"
    check_documented(columns, shown(found["normalise"], *names), shown(found["partition"], *names))


def test_named_factors_split_a_fused_output_by_head() -> None:
    plan = "mesh tp=2\ncolumns up over tp as (2 heads 8)\nrows down over tp\n"
    found = stages(Mlp(), rows(), plan)
    assert shown(found["partition"], "up_weight", "up_bias", "linear") == [
        "up_weight: f32[2·32@tp, 16] = input(parameter up.weight)",
        "up_bias: f32[2·32@tp] = input(parameter up.bias)",
        "linear: f32[8, 2·32@tp] = linear(x, up_weight, up_bias)",
    ]


def test_segments_are_split_each_by_itself() -> None:
    plan = "mesh tp=2\ncolumns up over tp as (f | g | g)\nlet f = 32\n"
    found = stages(Mlp(), rows(), plan)
    (line,) = shown(found["partition"], "up_bias")
    assert line == "up_bias: f32[(32@tp | 2·16@tp)] = input(parameter up.bias)"


def test_a_convolution_is_split_by_its_output_channels() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU())
    plan = meshwright.Plan.parse('mesh tp=2\ncolumns "0" over tp\n')
    program = meshwright.compile(
        model, plan, example=(torch.randn(2, 4, 8),), loss=lambda output: output.sum()
    )
    assert str(program.parameters["0.weight"].layout) == "[6@tp, 4, 3]"


class Turned(nn.Module):
    """A convolution whose weight is stored with its output channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(real(3, 4, 6)), nn.Parameter(real(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight.permute(2, 1, 0), self.bias).square().mean()


@pytest.mark.parametrize(
    ("line", "layout"), [("columns", "[3, 4, 6@tp]"), ("rows", "[3, 4@tp, 6]")]
)
def test_a_weight_may_be_stored_with_its_dims_in_any_order(line: str, layout: str) -> None:
    plan = f'mesh tp=2\n{line} "" over tp\n'
    program = check_equal(Turned(), lambda: (real(2, 4, 8),), plan, steps=1)
    assert str(program.parameters["weight"].layout) == layout


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("columns-does-not-divide", "mesh tp=3\ncolumns block.up over tp\n"),
        ("columns-no-linear", "mesh tp=2\ncolumns block.norm over tp\n"),
        ("columns-misspelt", "mesh tp=2\ncolumns block.upp over tp\n"),
        ("columns-contradict", "mesh a=2, b=2\ncolumns block.up over a\nvocab block.up over b\n"),
        ("columns-one-axis-twice", "mesh tp=2\ncolumns block.up over tp\nrows block.up over tp\n"),
        ("columns-few-heads", "mesh tp=4\ncolumns block.up over tp as (heads 32)\n"),
    ],
)
def test_mistakes_are_explained(name: str, plan: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Blocks(), meshwright.Plan.parse(plan), example=sequences())
    golden(name, str(caught.value))
