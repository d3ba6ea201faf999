"""One rank of `test_pipelines.py`: a pipeline of processes, and mishaps in the middle of a step."""

from __future__ import annotations

import os
import signal
from functools import cache
from typing import Any

import torch

import meshwright as mw
from benchmarks.peers.late import late
from meshwright.compiler.graph.ir import Phase
from meshwright.runtime.errors import RunError
from meshwright.runtime.executor import Executor
from tests.runtime.pipelines import PLAN, Looked, batch
from tests.runtime.same_run import rank_here, virtual


@cache
def compiled(schedule: str = "1f1b") -> mw.Program:
    """The program of every rank; forked ranks have it already."""
    torch.manual_seed(0)
    plan = mw.Plan.parse(PLAN.replace("=4\n", f"=4 schedule={schedule}\n"))
    return mw.compile(Looked(), plan, batch())


def launched() -> mw.Run:
    return compiled().launch()


def gradients(run: mw.Run) -> dict[str, Any]:
    """Those of this rank."""
    state = next(state for state in run.states if state.rank == rank_here())
    return {name: p.grad.clone() for name, p in state.parameters.items() if p.grad is not None}


def copies(run: mw.Run) -> None:
    """The same where each rank has a copy of both stages."""
    program = compiled("dualpipe")
    with program.launch() as own:
        same(own, program)


def same(run: mw.Run, program: mw.Program | None = None) -> None:
    """Two steps that add up give what they give on the virtual mesh."""
    with virtual():
        other = (program or compiled()).launch()
    losses = [(run.step(*batch()), other.step(*batch())) for _ in range(2)]
    ours, theirs = gradients(run), gradients(other)
    assert all(own.equal(other) for own, other in losses), losses
    assert ours
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def early(run: mw.Run) -> None:
    """The order in which a rank sends gradients and computes those of weights, and the same where
    it sends them after the whole backward, which gives the same gradients."""
    events: list[str] = []
    act, send = Executor.act, Executor._send

    def acts(self: Executor, action: Any, step: Any) -> Any:
        if action.kind is Phase.WEIGHT:
            events.append(f"weight {action.microbatch}")
        return (yield from act(self, action, step))

    def sends(self: Executor, entry: Any, leaving: Any) -> Any:
        if entry.link.source_phase is Phase.BACKWARD:
            events.append(f"sends {entry.microbatch}")
        return (yield from send(self, entry, leaving))

    Executor.act, Executor._send = acts, sends  # type: ignore[method-assign]
    program, found = compiled(), []
    for each in (program, late(program)):
        with each.launch() as own:
            own.step(*batch())
            found.append(gradients(own))
        if rank_here():
            print(", ".join(events))
        events.clear()
    assert all(value.equal(found[1][name]) for name, value in found[0].items())


def fails(run: mw.Run) -> None:
    """An operator of the last stage fails on the third microbatch of the second step."""
    run.step(*batch())
    before = gradients(run)
    x, ids = batch()
    ids[-3] = 99
    try:
        run.step(x, ids)
    except RunError as error:
        after = gradients(run)
        assert before
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)
        print(f"{type(error).__name__}: {error}")


def killed(run: mw.Run) -> None:
    """The last rank is killed after it has sent a gradient and received an activation."""
    act = Executor.act

    def dies(self: Executor, action: Any, step: Any) -> Any:
        if rank_here() and (action.kind, action.microbatch) == (Phase.FORWARD, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return act(self, action, step)

    Executor.act = dies  # type: ignore[method-assign]
    try:
        run.step(*batch())
    except RunError as error:
        print(f"{type(error).__name__}: {error}")


def warm_up() -> None:
    """Compile what every rank runs."""
    for schedule in ("1f1b", "dualpipe"):
        compiled(schedule)


def main(*names: str) -> None:
    torch.set_num_threads(1)
    with launched() as run:
        for name in names:
            {case.__name__: case for case in (copies, early, same, fails, killed)}[name](run)
            print(name, flush=True)
