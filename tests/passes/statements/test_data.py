"""The pass `data`: the batch of inputs is split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright import PlanError
from meshwright.passes.statements import data
from tests.passes.examples import Lm, Mlp, labelled, rows
from tests.passes.stages import check_documented, shown, stages


def test_the_docstring_shows_an_input_before_and_after() -> None:
    found = stages(Mlp(), rows(), "mesh dp=2\ndata x over dp\n")
    check_documented(data, shown(found["normalise"], "x"), shown(found["partition"], "x"))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x).matmul(y).sum()


def test_another_dim_and_two_axes_may_be_the_batch() -> None:
    plan = "mesh a=2, b=2\ndata x over (a, b) dim=1\nshard y [b, m, n]\n"
    example = torch.randn(3, 8, 16), torch.randn(3, 16, 2)
    found = stages(Two(), example, plan)
    assert shown(found["partition"], "x") == ["x: f32[3, 8@(a, b), 16] = input(argument x)"]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("data-forgotten", "mesh dp=2\ndata tokens over dp\n"),
        ("data-does-not-divide", "mesh dp=3\ndata tokens, targets over dp\n"),
        ("data-no-such-dim", "mesh dp=2\ndata tokens, targets over dp dim=1\n"),
        ("data-no-such-input", "mesh dp=2\ndata token, targets over dp\n"),
    ],
)
def test_mistakes_are_explained(name: str, plan: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Lm(), meshwright.Plan.parse(plan), example=labelled())
    golden(name, str(caught.value))


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale).sum()


def test_a_number_is_taken_out_of_data(golden: Callable[[str, str], None]) -> None:
    plan = meshwright.Plan.parse("mesh dp=2\ndata x, scale over dp\n")
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Scaled(), plan, example=(torch.randn(4, 3), torch.tensor(2.0)))
    golden("data-number", str(caught.value))


def test_an_input_is_split_over_two_dims_as_the_help_says(
    golden: Callable[[str, str], None],
) -> None:
    text, example = "mesh dp=2, cp=2\ndata x over dp\n", (torch.randn(4, 6), torch.tensor(2.0))
    plan = meshwright.Plan.parse(text + "data x over cp dim=1\n")
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Scaled(), plan, example=example)
    golden("data-two-dims", str(caught.value))
    found = stages(Scaled(), example, text + "shard x [d0@dp, d1@cp, ...]\n")
    assert shown(found["partition"], "x") == ["x: f32[4@dp, 6@cp] = input(argument x)"]


def test_an_input_whose_batch_is_another_dim_gets_a_line_of_its_own() -> None:
    text, example = "mesh dp=2\ndata x over dp dim=1\n", (torch.randn(3, 8), torch.randn(8))
    with pytest.raises(PlanError, match="write `data scale over dp`"):
        meshwright.compile(Scaled(), meshwright.Plan.parse(text), example=example)
    found = stages(Scaled(), example, text + "data scale over dp\n")
    assert shown(found["partition"], "x", "scale") == [
        "x: f32[3, 8@dp] = input(argument x)",
        "scale: f32[8@dp] = input(argument scale)",
    ]
