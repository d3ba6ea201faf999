"""Run one step on every rank of this process: all of it, or nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.runtime.executor import Executor
from meshwright.runtime.inputs import Sharder, check_dense
from meshwright.runtime.rank import RankProgram, Results

Ranks = Sequence[tuple[Executor, Sequence[Sharder]]]
"""The ranks of this process: what runs one, and what cuts its part out of each input."""
Run = Callable[[Sequence[RankProgram], Sequence[str]], list[Any]]
"""Runs one program per rank of this process; the names are those of its collectives."""


def whole_step(
    run: Run, ranks: Ranks, inputs: Sequence[Tensor], names: Sequence[str], *, training: bool
) -> list[Results]:
    """Run one step and commit it; one that fails or is interrupted leaves all as it was."""
    before = [executor.state.random.place for executor, _ in ranks]
    try:
        programs = [begun(*rank, inputs, training=training) for rank in ranks]
        found: list[Results] = run(programs, names)
        with torch.no_grad():
            for (executor, _), results in zip(ranks, found, strict=True):
                executor.commit(results)
    except BaseException:
        with torch.no_grad():
            for (executor, _), place in zip(ranks, before, strict=True):
                executor.undo()
                executor.state.random.restore(place)
        raise
    return found


def begun(
    executor: Executor, sharders: Sequence[Sharder], inputs: Sequence[Tensor], *, training: bool
) -> RankProgram:
    """One rank's part of a step of these global inputs, with random numbers of its own."""
    for tensor in inputs:
        check_dense(tensor)
    executor.state.random.begin(training=training)
    return executor.run({i: sharders[i](inputs[i]) for i in executor.taken})
