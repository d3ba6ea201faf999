"""Parameters of 16 bits: updates in float32, rounded stochastically where they are the masters."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler.kernels.hashing import RandomIndex
from meshwright.compiler.kernels.rounding import round_stochastically
from tests.runtime.models import PLANS, batch, make

MASTERS = "precision bf16 master=bf16\n"


@functools.cache
def program(plan: str) -> mw.Program:
    return mw.compile(make().float(), mw.Plan.parse(PLANS[plan] + MASTERS), batch())


def rounded(x: torch.Tensor, step: int = 0) -> torch.Tensor:
    out = torch.empty_like(x, dtype=torch.bfloat16)
    round_stochastically(x, RandomIndex(0, step, 1, tuple(x.shape), (0,) * x.ndim), out)
    return out


def test_the_mean_of_what_is_rounded_is_the_number() -> None:
    numbers = torch.tensor([1 + 1 / 512, 1e-3, -2.71828, 1e-40, -3e38])
    many = rounded(numbers.repeat(20_000, 1)).double()
    exact = numbers.double()
    gap = (many.amax(0) - many.amin(0)).abs()
    assert all(len(each.unique()) == 2 for each in many.T)
    # Of n draws between two neighbours the mean is off by gap / sqrt(n) / 2 at most, as a rule.
    assert ((many.mean(0) - exact).abs() < gap / 20_000**0.5 * 2).all()


def test_what_bfloat16_has_stays_as_it_is() -> None:
    special = [0.0, -0.0, 3.0, torch.inf, -torch.inf, 2.0**-126]
    numbers = torch.tensor([special]).repeat(100, 1)
    assert torch.equal(rounded(numbers).float(), numbers)
    assert rounded(torch.tensor([torch.nan] * 8)).isnan().all()
    assert rounded(torch.tensor(1.001)).shape == ()
    assert rounded(torch.ones(0, 3)).shape == (0, 3)


def test_other_steps_round_otherwise() -> None:
    x = torch.full((64,), 1 + 1 / 300)
    assert not torch.equal(rounded(x, 1), rounded(x, 2))
    assert torch.equal(rounded(x, 1), rounded(x, 1))


def updated(plan: str) -> dict[str, torch.Tensor]:
    """The state after two updates by gradients that are the same under every plan."""
    run = program(plan).launch(seed=3)
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-4, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    for number in range(2):
        run.step(*batch(number))
        generator = torch.Generator().manual_seed(number)
        for name, stored in run.program.parameters.items():
            gradient = torch.randn(stored.type.shape, generator=generator).bfloat16()
            for state in run.states:
                if (held := state.parameters[name].grad) is not None:
                    held.copy_(state.local(gradient, stored))
        optimizer.step()
        schedule.step()
        run.check(optimizer)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in kept} == {torch.float32}
    assert {parameter.dtype for parameter in run.parameters()} == {torch.bfloat16}
    return run.state_dict()


def test_every_plan_rounds_alike_also_where_storage_is_padded() -> None:
    first, *others = (updated(plan) for plan in ("data", "both", "zero"))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_updates_without_a_step_between_round_otherwise_and_alike_when_resumed(
    tmp_path: Path,
) -> None:
    """A decay of 1e-4 of each weight, by random bits that are new in every update."""
    runs = [program(plan).launch(seed=3) for plan in ("zero", "both")]
    pair = [run.optimizer(torch.optim.SGD, lr=1e-4, weight_decay=1.0) for run in runs]
    for number in range(3):
        if number == 2:
            runs[0].save(tmp_path, pair[0])
            runs[1] = program("tensor").launch(seed=4)
            pair[1] = runs[1].optimizer(torch.optim.SGD, lr=1.0)
            runs[1].load(tmp_path, pair[1])
        for run in runs:
            run.step(*batch())
            for parameter in run.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        changed = []
        for run, optimizer in zip(runs, pair, strict=True):
            before = run.state_dict()
            optimizer.step()
            first = run.state_dict()
            optimizer.step()
            second = run.state_dict()
            for one, other in ((before, first), (first, second)):
                changed.append(one["wte.weight"] != other["wte.weight"])
            run.check(optimizer)
        assert not torch.equal(changed[0], changed[1])
        for ours, theirs in zip(changed[:2], changed[2:], strict=True):
            assert torch.equal(ours, theirs)
    torch.testing.assert_close(runs[0].state_dict(), runs[1].state_dict(), rtol=0, atol=0)


def test_state_that_torch_loads_stays_in_float32() -> None:
    run = program("data").launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-3)
    for _ in range(2):
        run.step(*batch())
        optimizer.step()
        before = run.state_dict()
        kept = optimizer.state_dict()
        optimizer.load_state_dict(kept)
        assert {value.dtype for each in kept["state"].values() for value in each.values()} == {
            torch.float32
        }
        torch.testing.assert_close(optimizer.state_dict(), kept, rtol=0, atol=0)
        torch.testing.assert_close(run.state_dict(), before, rtol=0, atol=0)


def test_small_updates_are_not_lost() -> None:
    """Steps of 2e-4 of a weight of one, which rounding to the nearest loses."""
    run = program("data").launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=2e-4)
    norms = [p for name, p in run.named_parameters() if name.endswith("ln.weight")]
    assert all((norm == 1).all() for norm in norms)
    for _ in range(50):
        run.step(*batch())
        for parameter in run.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    mean = torch.stack([norm.detach().double().mean() for norm in norms]).mean()
    assert mean.item() == pytest.approx(1 - 50 * 2e-4, abs=2e-3)
    run.check(optimizer)


def test_an_update_that_fails_leaves_parameters_and_gradients_as_they_were() -> None:
    run = program("data").launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.step(*batch())
    before = run.state_dict(), run.gradients()
    optimizer.param_groups[0]["momentum"] = "none"
    with pytest.raises(TypeError):
        optimizer.step()
    for ours, theirs in zip((run.state_dict(), run.gradients()), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_is_updated_in_float32_and_rounded_to_the_nearest(
    dtype: torch.dtype, kind: type[torch.optim.Optimizer]
) -> None:
    plan = mw.Plan.parse(PLANS["zero"] + "precision bf16\n")
    run = mw.compile(make().to(dtype), plan, batch()).launch()
    optimizer = run.optimizer(kind, lr=0.01)
    wide = [nn.Parameter(p.detach().float()) for p in run.parameters() if p.requires_grad]
    run.step(*batch())
    for ours, own in zip(wide, (p for p in run.parameters() if p.requires_grad), strict=True):
        assert own.grad is None or own.grad.dtype == torch.float32
        ours.grad = own.grad
    kind(wide, lr=0.01).step()
    optimizer.step()
    for ours, own in zip(wide, (p for p in run.parameters() if p.requires_grad), strict=True):
        assert torch.equal(own, ours.to(dtype))
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in values} == {torch.float32}
    run.check(optimizer)


def test_a_step_with_a_closure_and_a_state_taken_over_are_those_without() -> None:
    found = []
    for closed in (False, True):
        run = program("both").launch(seed=1)
        optimizer = run.optimizer(torch.optim.AdamW, lr=0.01)

        def closure(run: mw.Run = run, optimizer: torch.optim.Optimizer = optimizer) -> Any:
            optimizer.zero_grad()
            return run.step(*batch())

        for _ in range(2):
            if closed:
                loss = optimizer.step(closure)
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            else:
                loss = closure()
                optimizer.step()
        values = [value for state in optimizer.state.values() for value in state.values()]
        assert {value.dtype for value in values} == {torch.float32}
        found.append((loss, run.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
