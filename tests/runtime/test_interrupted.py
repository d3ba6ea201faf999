"""A call that is left half done, and what a caller has set for all of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.runtime.transports import virtual
from tests.runtime.forked import Forked, Ranks

PLAN = "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\nrows down over tp\n"
PIPELINE = (
    "mesh dp=2, pp=2\ndata x over dp\nstages at down over pp microbatches=2 schedule=zb\n"
    "zero 2 over dp\n"
)


class Noisy(nn.Module):
    """A model whose step draws numbers and writes buffers."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.dropout = norm(8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(self.norm(x))))).square().mean()


@pytest.fixture(scope="module")
def program() -> mw.Program:
    torch.manual_seed(0)
    return mw.compile(Noisy(), mw.Plan.parse(PLAN), (torch.randn(8, 8),))


def everything(run: mw.Run) -> dict[str, Tensor]:
    return {
        **run.state_dict(),
        **{f"gradient {name}": value for name, value in run.gradients().items()},
        "step": torch.tensor(run.states[0].random.step),
    }


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(scope="module")
def pipeline() -> mw.Program:
    torch.manual_seed(0)
    return mw.compile(Noisy(nn.LayerNorm), mw.Plan.parse(PIPELINE), (torch.randn(8, 8),))


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("name", ["program", "pipeline"])
def test_a_step_that_is_interrupted_anywhere_did_not_happen(
    name: str,
    accumulated: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    program: mw.Program = request.getfixturevalue(name)
    undisturbed, run = program.launch(), program.launch()
    x, y = torch.randn(2, 8, 8)
    for each in (undisturbed, run):
        for _ in range(accumulated):
            each.step(x)
    before, expected = everything(run), undisturbed.step(y)
    give: Callable[..., None] = virtual._Driver.give
    count = 0

    def interrupted(self: Any, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        give(self, *args)

    monkeypatch.setattr(virtual._Driver, "give", interrupted)
    stop = 0
    while True:
        stop, count = stop + 1, 0
        try:
            loss = run.step(y)
        except KeyboardInterrupt:
            count, kept = stop, everything(run)
            assert equal(kept, before)
            run.check()
        else:
            break
    monkeypatch.undo()
    assert stop > 20
    assert torch.equal(loss, expected)
    assert equal(everything(run), everything(undisturbed))


def test_ranks_that_came_to_different_steps_do_not_save(
    program: mw.Program, tmp_path: Path
) -> None:
    run = program.launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.step(torch.randn(8, 8))
    optimizer.step()
    run.save(tmp_path, optimizer)
    run.states[2].num_updates -= 1
    with pytest.raises(mw.RunError, match="on rank 2: this rank has made 0 steps of the optimizer"):
        run.save(tmp_path, optimizer)
    run.states[2].random.step += 1
    with pytest.raises(mw.RunError, match=r"on rank 2: this rank has made 2 steps, and rank 0 1"):
        run.save(tmp_path, optimizer)
    run.load(tmp_path, optimizer)
    run.save(tmp_path, optimizer)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "a default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_a_caller_set_for_all_of_torch_does_not_reach_into_a_run(
    program: mw.Program, mode: str, tmp_path: Path
) -> None:
    x = torch.randn(8, 8)
    plain = program.launch()
    updates = plain.optimizer(torch.optim.Adagrad, lr=0.1)
    expected = plain.step(x)
    with MODES[mode]():
        run = program.launch()
        optimizer = run.optimizer(torch.optim.Adagrad, lr=0.1)
        loss = run.step(x)
        run.save(tmp_path, optimizer)
        run.load(tmp_path, optimizer)
        run.check(optimizer)
        weights = mw.read_state_dict(tmp_path)
    assert torch.equal(loss, expected)
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    for each in (optimizer, updates):
        each.step()
    assert torch.equal(run.step(x), plain.step(x))


def test_after_a_call_that_a_rank_left_half_done_nothing_meets_what_others_are_in(
    tmp_path: Path, forked: Forked
) -> None:
    ((_, ended),) = forked.run(Ranks("tests.runtime.half_done", 2, (str(tmp_path),)))
    outputs = ended.outputs
    assert "`KeyboardInterrupt` left a call half done" in outputs[1]
    assert "rank 1 was interrupted" in outputs[0]
    assert not list(tmp_path.iterdir())
