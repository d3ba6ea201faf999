"""Every collective names the line of the plan that it is there for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw

PLAN = """\
mesh dp=2, tp=2
data x, y over dp
columns blocks.*.up over tp
rows blocks.*.down over tp
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return ((x - y) ** 2).mean()


def lines(plan: str) -> set[tuple[str, str, tuple[str, ...], str]]:
    program = mw.compile(Model(), mw.Plan.parse(plan, "a.plan"), (torch.zeros(4, 6, 8),) * 2)
    return {(c.phase, c.kind, c.axes, c.plan_line) for c in program.comm()}


def test_reductions_name_the_rows_columns_and_data_behind_them() -> None:
    assert lines(PLAN) == {
        ("forward", "all_reduce", ("tp",), "a.plan:4"),
        ("forward", "all_reduce", ("dp",), "a.plan:2"),
        ("backward", "all_reduce", ("tp",), "a.plan:3"),
        ("backward", "all_reduce", ("dp",), "a.plan:2"),
    }


def test_what_a_sequence_statement_scatters_and_gathers_names_it() -> None:
    found = lines(PLAN + "sequence blocks.* over tp\n")
    tensor_parallel = {(kind, line) for _, kind, axes, line in found if axes == ("tp",)}
    assert tensor_parallel == {("reduce_scatter", "a.plan:5"), ("all_gather", "a.plan:5")}
    assert ("backward", "all_reduce", ("dp", "tp"), "a.plan:2, a.plan:5") in found


def test_a_layout_written_for_a_module_names_itself() -> None:
    found = lines(PLAN.replace("rows", "shard blocks.0 -> [b@dp, s@tp, d]\nrows"))
    assert ("forward", "all_gather", ("tp",), "a.plan:4") in found


def test_parameters_and_the_operators_that_take_them_name_their_statements() -> None:
    program = mw.compile(Model(), mw.Plan.parse(PLAN, "a.plan"), (torch.zeros(4, 6, 8),) * 2)
    assert program.parameters["blocks.0.up.weight"].plan_line == "a.plan:3"
    assert program.parameters["blocks.0.norm.weight"].plan_line == ""
    linears = [
        n for n in program.graph("stage0.forward").graph.nodes if n.name.startswith("linear")
    ]
    assert [n.origin.plan_line for n in linears] == ["a.plan:3", "a.plan:4"] * 2


def test_gradients_that_two_statements_reduce_name_each_for_its_axes() -> None:
    found = lines(PLAN + "sequence blocks.* over tp\n")
    assert ("backward", "all_reduce", ("dp",), "a.plan:2") in found


class Sorted(nn.Module):
    """A sort takes all of a dim, and a product of what two lines split can be had in two ways."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.sort(-1).values @ y.sort(-1).values.mT).square().sum()


@pytest.mark.parametrize(
    ("layouts", "instead"),
    [
        ("x [b, d@tp]", "there is no other way"),
        ("x [b@tp, d]\nshard y [c@tp, d]", "`matmul` of [16, 6], [6, 8] would send 192 B more"),
    ],
)
def test_a_move_has_what_the_next_best_choice_costs(layouts: str, instead: str) -> None:
    plan = mw.Plan.parse(f"mesh tp=2\nshard {layouts}\nallow replicate **\n")
    program = mw.compile(Sorted(), plan, (torch.zeros(16, 6), torch.zeros(8, 6)))
    (gather,) = (c for c in program.comm() if c.phase == "forward" and c.kind == "all_gather")
    assert gather.instead == instead
