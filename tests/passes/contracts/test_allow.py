"""The pass `allow`: gathers that nobody asked for are refused, unless small or allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright import LayoutError
from meshwright.passes.contracts import allow
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


@pytest.mark.parametrize("selector", ["**", "*"])
def test_allow_replicate_accepts_it(selector: str) -> None:
    plan = meshwright.Plan.parse(PLAN + f"allow replicate {selector}\n")
    program = meshwright.compile(
        nn.Sequential(Sorted()),
        plan.parse(PLAN.replace("data x", "data input") + f"allow replicate {selector}\n"),
        example=(torch.zeros(4096, 16),),
    )
    assert program.comm().counts()["all_gather[dp]"] == 1


class Solved(nn.Module):
    """An operator without a rule, on two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ torch.linalg.solve(self.a, self.b)).square().sum()


class Ranked(nn.Module):
    """An operator that needs whole features, inside a region whose sequence is split."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(12, 24), Sort(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.block(x)).square().sum()


class Sort(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


@pytest.mark.parametrize(
    ("model", "shape", "plan", "culprit"),
    [
        (Solved, (8, 16), "shard a [n@tp, d]\nshard b [n@tp, d]", "`linalg_solve"),
        (Ranked, (2, 6, 12), "columns block.0 over tp\nsequence block over tp", "`sort`"),
    ],
    ids=["two weights", "sequence"],
)
def test_a_gather_is_excused_only_by_an_operand_that_stays_as_the_plan_wrote_it(
    model: type[nn.Module],
    shape: tuple[int, ...],
    plan: str,
    culprit: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed = meshwright.Plan.parse(f"mesh tp=2\n{plan}\n")
    monkeypatch.setattr(allow, "LIMIT", 0)
    with pytest.raises(LayoutError, match=culprit):
        meshwright.compile(model(), parsed, example=(torch.randn(shape),))


class Ladder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), Sort()) for _ in range(3))
        self.last = Sorted()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def test_the_help_allows_all_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = "mesh tp=2\ncolumns layers.*.0 over tp\ncolumns last.a over tp\n"
    monkeypatch.setattr(allow, "LIMIT", 0)
    with pytest.raises(LayoutError) as caught:
        meshwright.compile(Ladder(), meshwright.Plan.parse(plan), example=(torch.randn(8, 16),))
    _, statement, _ = caught.value.help.split("`", 2)
    assert statement == "allow replicate layers.*.1"
    plan = meshwright.Plan.parse(f"{plan}{statement}\n")
    program = meshwright.compile(Ladder(), plan, example=(torch.randn(8, 16),))
    assert program.comm().counts()["all_gather[tp]"] == 3


class Fused(nn.Module):
    """Queries, keys and values of four heads of four from one linear, taken apart in two ways."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.qkv, self.view = nn.Linear(8, 48), view

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        q, k, v = y.unflatten(-1, (3, 4, 4)).unbind(-3) if self.view else y.split([16, 16, 16], -1)
        return (q * k.tanh() * v.sigmoid()).square().mean()


@pytest.mark.parametrize("view", [True, False])
def test_the_help_names_the_factors_that_a_fused_dim_is_made_of(
    view: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allow, "LIMIT", 0)
    plan = meshwright.Plan.parse("mesh tp=2\ncolumns qkv over tp\n")
    with pytest.raises(LayoutError) as caught:
        meshwright.compile(Fused(view), plan, example=(torch.zeros(2, 8),))
    dim = "(3 4@tp 4)" if view else "(16@tp | 16@tp | 16@tp)"
    assert f"help: lay out the dim as `{dim}` with `shard`" in str(caught.value)
    followed = f"mesh tp=2\nshard qkv.weight [{dim}, d]\nshard qkv.bias [{dim}]\n"
    program = check_equal(Fused(view), lambda: (real(2, 8),), followed, steps=1)
    assert implicit_gathers(program) == []


class Mirrored(nn.Module):
    """One that takes the whole batch of an input for each of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.up(x) - y.flip(0)).square().mean()


@pytest.mark.parametrize(
    ("plan", "gathers"),
    [
        ("mesh dp=1\ndata x, y over dp\naccumulate 4\n", 0),
        ("mesh dp=2\ndata x, y over dp\naccumulate 4\n", 1),
    ],
    ids=["microbatches", "and ranks"],
)
def test_what_all_microbatches_take_together_is_a_gather_only_between_ranks(
    plan: str, gathers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not gathers:
        monkeypatch.setattr(allow, "LIMIT", 0)
    program = check_equal(Mirrored(), (real(8, 16), real(8, 16)), plan)
    assert len(implicit_gathers(program)) == gathers
    program.show()
    assert ("flip" in capsys.readouterr().out) == bool(gathers)
