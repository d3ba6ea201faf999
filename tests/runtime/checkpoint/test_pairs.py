"""A run goes on in the same way under any plan, whatever plan saved it: to the bit where the two
compute alike, and else to what the order of sums changes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import meshwright as mw
from tests.runtime.models import PLANS, batch, make

_MLP = "columns blocks.*.up over tp\nrows blocks.*.down over tp\nvocab wte, head over tp\n"
_DATA = "data tokens, targets over dp\n"
PAIRED = {
    "data": "mesh dp=4\n" + _DATA,
    "both": PLANS["both"],
    "tensor": "mesh tp=4\n" + _MLP,
    "zero 1": f"mesh dp=4\n{_DATA}zero 1 over dp",
    "zero 2": f"mesh dp=4\n{_DATA}zero 2 over dp",
    "zero 3": f"mesh dp=4\n{_DATA}zero 3 over dp",
    "accumulated": f"mesh dp=2\n{_DATA}zero 2 over dp\naccumulate 2",
    "one": "mesh dp=1\n",
}
ALIKE = {"data", "zero 1", "zero 2", "zero 3"}
"""Plans whose ranks compute the same sums in the same order."""
GROUPS = [{"params": ["**.bias"], "weight_decay": 0.0}]
STEPS = 5
Trained = tuple[mw.Run, torch.optim.Optimizer]


@functools.cache
def trained(plan: str) -> Trained:
    """A run that has dropped out other elements of other batches."""
    program = mw.compile(make(dropout=0.2), mw.Plan.parse(PAIRED[plan]), batch())
    run = program.launch(seed=len(plan))
    optimizer = run.optimizer(torch.optim.AdamW, groups=GROUPS, lr=1e-2, weight_decay=0.1)
    losses(run, optimizer, 20)
    return run, optimizer


def losses(run: mw.Run, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    found = []
    for number in range(first, first + STEPS):
        found.append(run.step(*batch(number)).item())
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("source", PAIRED)
def test_a_run_goes_on_under_any_plan_as_under_the_one_that_saved_it(
    tmp_path: Path, source: str
) -> None:
    run, optimizer = trained(source)
    run.save(tmp_path, optimizer)
    expected = losses(run, optimizer, 0)
    for target in PAIRED:
        other, theirs = trained(target)
        other.load(tmp_path, theirs)
        found = losses(other, theirs, 0)
        if source == target or {source, target} <= ALIKE:
            assert found == expected, target
        else:
            assert found == pytest.approx(expected, rel=0, abs=1e-12), target
