"""The pass `allow`: gathers that nobody asked for are refused, unless small or allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright import LayoutError
from tests.equivalence import check_equal, implicit_gathers
from tests.models import real


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).sort(0).values.square().sum()


PLAN = "mesh dp=2\ndata x over dp\n"


def test_a_large_gather_is_refused_by_name(golden: Callable[[str, str], None]) -> None:
    with pytest.raises(LayoutError) as caught:
        meshwright.compile(Sorted(), meshwright.Plan.parse(PLAN), example=(torch.zeros(4096, 16),))
    golden("allow-refused", str(caught.value))


def test_a_small_gather_is_listed_and_lets_the_plan_compile() -> None:
    program = check_equal(Sorted(), lambda: (real(8, 16),), PLAN)
    assert len(implicit_gathers(program)) == 1


def test_the_limit_can_be_set_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_IMPLICIT_BYTES", "0")
    with pytest.raises(LayoutError, match="sort"):
        meshwright.compile(Sorted(), meshwright.Plan.parse(PLAN), example=(torch.zeros(8, 16),))


@pytest.mark.parametrize("selector", ["**", "*"])
def test_allow_replicate_accepts_it(selector: str) -> None:
    plan = meshwright.Plan.parse(PLAN + f"allow replicate {selector}\n")
    program = meshwright.compile(
        nn.Sequential(Sorted()),
        plan.parse(PLAN.replace("data x", "data input") + f"allow replicate {selector}\n"),
        example=(torch.zeros(4096, 16),),
    )
    assert program.comm().counts()["all_gather[dp]"] == 1
