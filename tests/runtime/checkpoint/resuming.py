"""Run by every process of a test: load a checkpoint, train two steps, save another.

Arguments: a plan or its name, the folder to load from ("-" for none), that to save into, the first
step.
Prints a digest of what the run then holds.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

import meshwright as mw
from tests.runtime.models import PLANS, batch, make


@functools.cache
def compiled(plan: str) -> mw.Program:
    return mw.compile(make(seed=0), mw.Plan.parse(PLANS.get(plan, plan)), example=batch())


def go_on(plan: str, source: str, target: str, first: int) -> str:
    """Train from a checkpoint and save; a digest of the weights, which rounding does not change."""
    with compiled(plan).launch(seed=3) as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        if source != "-":
            assert run.load(source, optimizer) == {"step": first}
        for number in range(first, first + 2):
            run.step(*batch(number))
            optimizer.step()
            optimizer.zero_grad()
        run.check(optimizer)
        run.save(Path(target), optimizer, extra={"step": first + 2})
        state = run.state_dict()
    text = " ".join(f"{value:.8f}" for t in state.values() for value in t.flatten().tolist())
    return hashlib.sha256(text.replace("-0.00000000", "0.00000000").encode()).hexdigest()


def main(plan: str, source: str, target: str, first: str) -> None:
    print(go_on(plan, source, target, int(first)))
