"""Run by every process of a test: two ranks hold one half of a model each. Argument: a folder.

Beside it, in each process, a run on the virtual mesh holds all and computes the gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import meshwright as mw
from tests.runtime.checkpoint.test_plans import contents, same
from tests.runtime.held import HALVES, equal, held, whole
from tests.runtime.models import batch, make
from tests.runtime.same_run import virtual
from tests.runtime.test_held import adamw

PLAN = "mesh pp=2\nallow replicate **\n"


def give_gradients(run: mw.Run, one: mw.Run) -> None:
    source = one.states[run.states[0].rank]
    for name, parameter in run.named_parameters():
        gradient = source.parameters[name].grad
        parameter.grad = None if gradient is None else gradient.clone()
    run.states[0].random.step = source.random.step


def main(folder: Path) -> None:
    program = whole(PLAN)
    run = held(program, HALVES).launch()
    with virtual():
        one, other = (program.launch(state_dict=make(s).state_dict()) for s in (0, 1))
    assert 0 < len(dict(run.named_parameters())) < len(program.parameters)
    runs, optimizers = (run, one), [adamw(run), adamw(one)]
    for number in range(2):
        one.step(*batch(number))
        give_gradients(run, one)
        torch.testing.assert_close(*(each.clip_grad_norm_(0.5) for each in runs))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state, expected = run.state_dict(), one.state_dict()
    del state["steps"], expected["steps"]
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)
    run.load_state_dict(one.state_dict())
    run.check(optimizers[0])
    run.save(folder / "held", optimizers[0])
    theirs = adamw(other)
    other.load(folder / "held", theirs)
    assert equal(other, one)
    other.save(folder / f"again {run.states[0].rank}", theirs)
    assert same(contents(folder / "held"), contents(folder / f"again {run.states[0].rank}"))
    run.load(folder / "held", optimizers[0])
    run.check(optimizers[0])
    one.step(*batch())
    give_gradients(run, one)
    for name, parameter in run.named_parameters():
        if name == "blocks.1.up.bias":
            parameter.grad = torch.full_like(parameter, torch.nan)
    # As if a step had run: an update looks at what steps have made since the last one.
    run._finite_check.end(None, torch.zeros(()))
    with pytest.raises(mw.RunError, match=r"the gradient of `blocks\.1\.up\.bias` has a NaN"):
        optimizers[0].step()
    with virtual():
        one.close()
    run.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
