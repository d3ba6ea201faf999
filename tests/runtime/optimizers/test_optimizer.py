"""Optimizers over shards, each beside itself over the whole model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn, optim

import meshwright as mw
from tests.runtime.models import batch, make
from tests.runtime.test_run import compiled, difference, trained

OPTIMIZERS: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.ASGD, {"lr": 0.01, "t0": 1}),
    (optim.Adadelta, {"lr": 0.5}),
    (optim.Adagrad, {"lr": 0.01}),
    (optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    (optim.Adagrad, {"lr": 0.01, "weight_decay": 0.1, "foreach": True}),
    (optim.Adam, {"lr": 0.01}),
    (optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    (optim.AdamW, {"lr": 0.01, "maximize": True}),
    (optim.AdamW, {"lr": 0.01, "foreach": False}),
    (optim.AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    (optim.Adamax, {"lr": 0.01, "weight_decay": 0.1}),
    (optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.RAdam, {"lr": 0.01}),
    (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    (optim.Rprop, {"lr": 0.01}),
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "maximize": True}),
]
DATA = "mesh dp={}\ndata tokens, targets over dp\nzero {} over dp\n"
TENSOR = "columns blocks.*.up over tp\nrows blocks.*.down over tp\nvocab wte, head over tp\n"


@functools.cache
def sharded(level: int) -> mw.Program:
    """The program of a model with a tied head, a frozen weight and sizes that do not divide."""
    plan = DATA.format(4, level) + "accumulate 2\n"
    if level == 1:
        plan = DATA.format("2, tp=2", level) + TENSOR + "sequence blocks.* over tp\n"
    return mw.compile(make(), mw.Plan.parse(plan), batch())


@pytest.mark.parametrize(
    ("level", "kind", "options"),
    [(each % 3 + 1, *case) for each, case in enumerate(OPTIMIZERS)],
)
def test_shards_are_updated_as_the_whole_model_is(
    level: int, kind: Any, options: dict[str, Any]
) -> None:
    reference, run = make(), sharded(level).launch()
    ours = run.optimizer(kind, **options)
    theirs = kind(trained(reference), **copy.deepcopy(options))
    schedules = [optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (ours, theirs)]
    for number in range(3):
        run.step(*batch(number))
        reference(*batch(number))["loss"].backward()
        for each in (ours, theirs, *schedules):
            each.step()
        for each in (ours, theirs):
            each.zero_grad()
    run.check(ours)
    assert difference(run.state_dict(), reference.state_dict()) < 1e-12


@pytest.mark.parametrize("level", [1, 2, 3])
def test_what_looks_at_whole_tensors_is_refused_where_they_are_stored_split(level: int) -> None:
    run = sharded(level).launch()
    with pytest.raises(mw.RunError, match="does not update elements one by one"):
        run.optimizer(optim.Adafactor)


def test_an_update_is_fused_where_the_class_can_and_nobody_says_otherwise() -> None:
    run = compiled().launch()

    def fused(kind: Any, **options: Any) -> list[object]:
        found = run.optimizer(kind, **options)
        return [group.get("fused") for group in found.param_groups]

    for kind in (optim.Adagrad, optim.Adam, optim.AdamW, optim.SGD):
        assert fused(kind) == [True]
        assert fused(kind, foreach=True) == [None]
        assert fused(kind, fused=False) == [False]
    assert fused(optim.Adam, groups=[{"params": "**.bias", "fused": False}]) == [False, None]
    assert fused(optim.RMSprop) == [None]

    class Own(optim.AdamW):
        """May do anything with its options."""

    assert fused(Own) == [None]


def test_a_complex_weight_is_not_updated_by_a_fused_kernel() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.turn).abs().square().mean()

    x = torch.randn(2, 4)
    run = mw.compile(Phase(), mw.Plan.parse("mesh dp=2\ndata x over dp"), (x,)).launch()
    optimizer = run.optimizer(optim.Adam)
    run.step(x)
    optimizer.step()
    run.check(optimizer)


class Assigning(optim.Optimizer):
    """A step down the gradient that makes new tensors rather than writing into the parameters."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data - group["lr"] * parameter.grad


@pytest.mark.parametrize("precision", ["", "precision bf16\n", "precision bf16 master=bf16\n"])
def test_what_is_assigned_to_the_data_of_a_parameter_is_trained_on(precision: str) -> None:
    def losses(kind: Any) -> list[float]:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
        plan = mw.Plan.parse(f"mesh dp=2\ndata input over dp\nzero 3 over dp\n{precision}")
        run = mw.compile(model, plan, (x,), loss=lambda out: out.square().mean()).launch()
        optimizer = run.optimizer(kind, lr=0.1)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            found.append(run.step(x).item())
            optimizer.step()
        return found

    assert losses(Assigning) == pytest.approx(losses(optim.SGD), rel=1e-6)
    assert losses(Assigning)[2] < losses(Assigning)[0]


class BiasFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.linear = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) + self.bias).square().mean()


def test_the_state_of_lbfgs_is_taken_over_whatever_parameter_is_first() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    run = mw.compile(BiasFirst(), mw.Plan.parse("mesh dp=1"), (x,)).launch()
    optimizer = run.optimizer(optim.LBFGS, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return run.step(x)

    optimizer.step(closure)
    weights, state = run.state_dict(), copy.deepcopy(optimizer.state_dict())
    optimizer.step(closure)
    expected = run.state_dict()
    run.load_state_dict(weights)
    optimizer.load_state_dict(state)
    optimizer.step(closure)
    torch.testing.assert_close(run.state_dict(), expected, rtol=0, atol=0)
