"""Training in float16: gradients are scaled while they are computed, and overflows skip updates."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import meshwright as mw
from meshwright.cli import main
from meshwright.runtime.errors import NonFiniteError
from tests.runtime.checkpoint.states import differing, snapshot
from tests.runtime.models import PLANS, batch, make


@functools.cache
def program(plan: str, precision: str = "fp16") -> mw.Program:
    statement = f"precision {precision}\n" if precision else ""
    return mw.compile(make().float(), mw.Plan.parse(PLANS[plan] + statement), batch())


def set_scale(run: mw.Run, value: float, num_clean: int = 0) -> None:
    for state in run.states:
        state.loss_scale.value, state.loss_scale.num_clean = value, num_clean


def weights(run: mw.Run) -> dict[str, torch.Tensor]:
    return {name: value for name, value in run.state_dict().items() if name != "steps"}


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_those_of_the_model_whatever_the_scale(plan: str) -> None:
    expected = program("data", "").launch()
    expected.step(*batch())
    exact = expected.gradients()
    for scale in (1.0, 65536.0):
        run = program(plan).launch()
        set_scale(run, scale)
        for _ in range(2):
            run.step(*batch())
        for name, gradient in run.gradients().items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, 2 * exact[name], rtol=0.05, atol=4e-3)


def test_an_update_that_overflows_is_skipped_and_halves_the_scale() -> None:
    run = program("zero").launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
    set_scale(run, 2.0**40, num_clean=7)
    before = weights(run)
    run.step(*batch())
    run.clip_grad_norm_(1.0)
    optimizer.step()
    assert not optimizer.state
    assert (run.loss_scale, run.num_skipped) == (2.0**39, 1)
    assert all(state.loss_scale.num_clean == 0 for state in run.states)
    assert all(state.num_updates == 0 for state in run.states)
    assert any(parameter.grad is not None for parameter in run.parameters())
    torch.testing.assert_close(weights(run), before, rtol=0, atol=0)
    optimizer.zero_grad()
    set_scale(run, 1024.0, num_clean=1999)
    run.step(*batch())
    optimizer.step()
    assert run.loss_scale == 2048.0
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    run.check(optimizer)


def test_a_closure_is_looked_at_when_it_has_run() -> None:
    run = program("data").launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
    before = weights(run)

    def closure(bad: bool) -> torch.Tensor:
        optimizer.zero_grad()
        loss = run.step(*batch())
        if bad:
            overflow(run)
        return loss

    optimizer.step(lambda: closure(True))
    assert (run.num_skipped, run.states[0].num_updates) == (1, 0)
    torch.testing.assert_close(weights(run), before, rtol=0, atol=0)
    assert optimizer.step(closure=lambda: closure(False)).isfinite()
    assert (run.num_skipped, run.states[0].num_updates) == (1, 1)
    assert not torch.equal(weights(run)["wte.weight"], before["wte.weight"])


def test_two_optimizers_skip_together_and_count_once() -> None:
    run = program("data").launch()
    groups = [{"params": "blocks.**"}]
    pair = [run.optimizer(torch.optim.SGD, lr=0.1, groups=groups) for _ in range(2)]
    set_scale(run, 2.0**40)
    before = weights(run)
    run.step(*batch())
    for optimizer in pair:
        optimizer.step()
    assert (run.loss_scale, run.num_skipped) == (2.0**39, 1)
    torch.testing.assert_close(weights(run), before, rtol=0, atol=0)


@pytest.mark.parametrize("check", [True, False])
def test_a_nan_of_the_forward_is_no_overflow(check: bool) -> None:
    run = program("both").launch(check_finite=check)
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    state = run.state_dict()
    state["blocks.0.up.weight"][3, 3] = torch.nan
    run.load_state_dict(state)
    run.step(*batch())
    if check:
        with pytest.raises(NonFiniteError, match=r"the parameter `blocks.0.up.weight` has a NaN"):
            optimizer.step()
    assert run.num_skipped == 0


def test_a_closure_overflows_or_finds_a_bad_parameter_before_the_update() -> None:
    run = program("both").launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    before = weights(run)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return run.step(*batch())

    set_scale(run, 2.0**60)
    assert optimizer.step(closure).isfinite()
    torch.testing.assert_close(weights(run), before, rtol=0, atol=0)
    assert (run.loss_scale, run.num_skipped) == (2.0**59, 1)
    state = run.state_dict()
    state["blocks.0.up.weight"][3, 3] = torch.nan
    run.load_state_dict(state)
    with pytest.raises(NonFiniteError, match=r"the parameter `blocks.0.up.weight` has a NaN"):
        optimizer.step(closure)


def test_a_scale_that_cannot_fall_any_more_is_an_error(golden: Callable[[str, str], None]) -> None:
    run = program("data").launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    set_scale(run, 1.0)
    run.step(*batch())
    next(p for p in run.parameters() if p.grad is not None).grad.fill_(torch.inf)
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step()
    golden("loss_scale", str(caught.value))


def overflow(run: mw.Run) -> None:
    """Let a gradient of the first rank overflow."""
    gradients = (p.grad for p in run.states[0].parameters.values())
    next(each for each in gradients if each is not None).fill_(torch.inf)


def train(run: mw.Run, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """Steps of which those numbered 1, 2 and 4 overflow."""
    for number in numbers:
        run.step(*batch(number))
        if number in (1, 2, 4):
            overflow(run)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("plan", ["zero", "tensor"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path, plan: str) -> None:
    runs = [program(plan).launch(seed=seed) for seed in (3, 4)]
    pair = [run.optimizer(torch.optim.AdamW, lr=0.01) for run in runs]
    train(runs[0], pair[0], range(4))
    runs[0].save(tmp_path, pair[0])
    runs[1].load(tmp_path, pair[1])
    assert not differing(*map(snapshot, runs, pair))
    for run, optimizer in zip(runs, pair, strict=True):
        assert (run.loss_scale, run.num_skipped) == (2.0**14, 2)
        train(run, optimizer, range(4, 6))
        assert (run.loss_scale, run.num_skipped) == (2.0**13, 3)
        run.check(optimizer)
    assert not differing(*map(snapshot, runs, pair))


def test_a_scale_goes_into_any_plan_and_other_precisions_leave_it(tmp_path: Path) -> None:
    run = program("zero").launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.01)
    train(run, optimizer, range(3))
    run.save(tmp_path / "scaled", optimizer)
    other, exact = program("tensor").launch(), program("data", "").launch()
    for each in (other, exact):
        each.load(tmp_path / "scaled")
    assert (other.loss_scale, other.num_skipped) == (2.0**14, 2)
    assert (exact.loss_scale, exact.num_skipped) == (1.0, 0)
    exact.save(tmp_path / "exact")
    other.load(tmp_path / "exact")
    assert (other.loss_scale, other.num_skipped) == (65536.0, 0)
    main(["ckpt", "reshard", str(tmp_path / "scaled"), str(tmp_path / "cut"), "--parts", "3"])
    other.load(tmp_path / "cut")
    assert (other.loss_scale, other.num_skipped) == (2.0**14, 2)


def test_ranks_with_other_scales_are_told_by_check(golden: Callable[[str, str], None]) -> None:
    run = program("data").launch()
    run.states[1].loss_scale.value = 8.0
    with pytest.raises(mw.RunError) as caught:
        run.check()
    golden("loss_scale_differs", str(caught.value))


def test_ls_shows_the_scale_of_a_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = program("data").launch()
    set_scale(run, 1024.0, num_clean=3)
    run.save(tmp_path)
    assert main(["ckpt", "ls", str(tmp_path)]) == 0
    header, *_, row = [line for line in capfd.readouterr().out.splitlines() if line.strip()]
    assert "loss scale" in header and " 1024 " in row
    main(["ckpt", "ls", str(tmp_path), "--json"])
    scale = json.loads(capfd.readouterr().out)[0]["loss_scale"]
    assert scale == {"value": 1024.0, "num_clean": 3, "num_skipped": 0}


def test_without_float16_there_is_no_scale() -> None:
    run = program("data", "").launch()
    assert (run.loss_scale, run.num_skipped) == (1.0, 0)
