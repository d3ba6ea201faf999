"""One rank of `test_pipelines.py`: a pipeline of processes, and mishaps in the middle of a step."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

import meshwright as mw
from meshwright.compiler.graph.ir import Phase
from meshwright.runtime.errors import RunError
from meshwright.runtime.executor import Executor
from meshwright.runtime.transports import meshes
from tests.runtime.pipelines import PLAN, Looked, batch

RANK = int(os.environ["RANK"])


def launched() -> mw.Run:
    torch.manual_seed(0)
    return mw.compile(Looked(), mw.Plan.parse(PLAN), batch()).launch()


def gradients(run: mw.Run, rank: int) -> dict[str, Any]:
    """Those of a rank that is in this process."""
    state = next(state for state in run.states if state.rank == rank)
    return {name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None}


def same(run: mw.Run) -> None:
    """Two steps that add up give what they give on the virtual mesh."""
    meshes.under_torchrun = lambda: False
    virtual = launched()
    losses = [(run.step(*batch()), virtual.step(*batch())) for _ in range(2)]
    ours, theirs = gradients(run, RANK), gradients(virtual, RANK)
    assert all(own.equal(other) for own, other in losses), losses
    assert ours
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def fails(run: mw.Run) -> None:
    """An operator of the last stage fails on the third microbatch of the second step."""
    run.step(*batch())
    before = gradients(run, RANK)
    x, ids = batch()
    ids[-3] = 99
    try:
        run.step(x, ids)
    except RunError as error:
        after = gradients(run, RANK)
        assert before
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)
        print(f"{type(error).__name__}: {error}")


def killed(run: mw.Run) -> None:
    """The last rank is killed after it has sent a gradient and received an activation."""
    act = Executor._act

    def dies(self: Executor, action: Any, step: Any) -> Any:
        if RANK and (action.kind, action.microbatch) == (Phase.FORWARD, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return act(self, action, step)

    Executor._act = dies  # type: ignore[method-assign]
    try:
        run.step(*batch())
    except RunError as error:
        print(f"{type(error).__name__}: {error}")


def main(*names: str) -> None:
    torch.set_num_threads(1)
    with launched() as run:
        for name in names:
            {case.__name__: case for case in (same, fails, killed)}[name](run)
            print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
