"""The pass `partition`: every node has a layout, every change of layout is a collective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshwright.passes import partition
from tests.equivalence import check_equal
from tests.models import rows as doubles
from tests.passes.examples import Mlp, rows
from tests.passes.stages import check_documented, shown, stages


def test_the_docstring_shows_a_pending_sum_before_and_after() -> None:
    plan = "mesh dp=2, tp=2\ndata x over dp\nrows up over tp\n"
    found = stages(Mlp(), rows(), plan)
    check_documented(
        partition,
        shown(found["normalise"], "linear", "relu"),
        shown(found["partition"], "slice", "vary", "linear", "all_reduce", "vary_1", "add", "relu"),
    )


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.relu(self.a(x)))
        return (h * h + h.exp()).mean()


def test_a_pending_sum_with_many_users_is_reduced_once() -> None:
    plan = "mesh tp=2\ncolumns a over tp\nrows b over tp\n"
    program = check_equal(Squares(), doubles, plan)
    assert program.comm().counts() == {"all_reduce[tp]": 1}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).neg().transpose(0, 1).mul(2).sum()


def test_a_pending_sum_passes_what_is_linear() -> None:
    plan = "mesh tp=2\ncolumns a over tp\nrows b over tp\n"
    program = check_equal(Linear(), doubles, plan)
    (moved,) = program.comm()
    assert (moved.kind, moved.type) == ("all_reduce", "f64[] partial(tp)")


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return (h.softmax(0) * h.log_softmax(0)).sum() + h.var(0).sum()


def test_an_operator_that_would_gather_is_placed_in_pieces() -> None:
    program = check_equal(Statistics(), doubles, "mesh dp=4\ndata x over dp\n")
    assert set(program.comm().counts()) == {"all_reduce[dp]"}
    whole = stages(Statistics(), rows(), "mesh tp=2\ncolumns a over tp\n")["partition"]
    assert any("softmax" in node.name for node in whole.nodes)
