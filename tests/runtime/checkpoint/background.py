"""Run by both processes of a test: saves in the background, one of which fails on rank 1; it ends
without closing the run."""

from __future__ import annotations

from typing import Any

import meshwright as mw
from meshwright.runtime.checkpoint import saving
from tests.runtime.checkpoint.states import differing, snapshot
from tests.runtime.checkpoint.test_checkpoint import train
from tests.runtime.checkpoint.test_loading import adamw
from tests.runtime.models import PLANS, batch, make

write_shard = saving.write_shard


def full(*given: Any) -> str:
    raise mw.RunError("the disk is full", help="make room there")


def main(folder: str) -> None:
    run = mw.compile(make(), mw.Plan.parse(PLANS["tensor"]), batch()).launch()
    optimizer = adamw(run)
    for first in range(3):
        train(run, optimizer, first, 1)
        before = snapshot(run, optimizer)
        run.save(folder, optimizer, wait=False)
    train(run, optimizer, 3, 1)
    run.load(folder, optimizer)
    print("right" if not differing(before, snapshot(run, optimizer)) else "wrong")
    train(run, optimizer, 3, 1)
    if run.states[0].rank == 1:
        saving.write_shard = full
    run.save(folder, optimizer, wait=False)
    try:
        run.wait_saved()
    except mw.RunError as error:
        print(error)
    saving.write_shard = write_shard
    for first in (4, 5):
        train(run, optimizer, first, 1)
        run.save(folder, optimizer, wait=False)
