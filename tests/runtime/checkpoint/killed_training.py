"""Run by a test: a training of two processes of which one is killed again and again, at any moment.

Arguments: a folder, and the number of kills. Every step is saved, in turn while the ranks wait and
in the background. Prints how many losses of how many were those of a training that is not killed.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import torch

import meshwright as mw
from meshwright.runtime.checkpoint import saving
from tests.runtime.checkpoint.forks import become, ended, forked
from tests.runtime.models import batch, make
from tests.runtime.processes import free_port

PLAN = "mesh dp=2\ndata tokens, targets over dp\nzero 2 over dp\n"
_RECORD = struct.Struct("<qd")


def train(program: mw.Program, folder: Path, log: Path, last: int | None) -> None:
    """Go on from the newest checkpoint, up to a step or for ever; write each step and its loss."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with program.launch(seed=3) as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        extra = run.load(folder, optimizer, missing_ok=True)
        if extra:
            schedule.load_state_dict(extra["schedule"])
        step = extra.get("step", 0)
        while last is None or step < last:
            os.write(file, _RECORD.pack(step, run.step(*batch(step)).item()))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            saved = {"step": step, "schedule": schedule.state_dict()}
            run.save(folder, optimizer, extra=saved, wait=step % 3 == 0)


def started(program: mw.Program, folder: Path, log: Path, last: int | None) -> list[int]:
    """The two ranks."""
    port = free_port()

    def rank(number: int) -> None:
        become(number, 2, port)
        train(program, folder, log.with_suffix(f".{number}"), last)

    return [forked(lambda number=number: rank(number)) for number in range(2)]  # type: ignore[misc]


def killed(program: mw.Program, folder: Path, log: Path, dice: random.Random, soon: bool) -> None:
    """Train, and kill one of the two at some moment; the other `soon` after, or it must end by
    itself."""
    victim = dice.randrange(2)
    written = log.with_suffix(".0")
    before = written.stat().st_size if written.exists() else 0
    children = started(program, folder, log, None)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if written.exists() and written.stat().st_size > before:
            break
        time.sleep(0.005)
    time.sleep(dice.random() * 0.5)
    os.kill(children[victim], signal.SIGKILL)
    if soon:
        time.sleep(dice.random() * 0.2)
        os.kill(children[1 - victim], signal.SIGKILL)
    statuses = ended(children, 60)
    assert statuses[victim] == -9, statuses
    assert statuses[1 - victim] in ([-9, 1] if soon else [1]), f"not its error: {statuses}"


def losses(log: Path, rank: int) -> list[tuple[int, float]]:
    raw = log.with_suffix(f".{rank}").read_bytes()
    return [(step, loss) for step, loss in _RECORD.iter_unpack(raw)]


def main(folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    saving._PATIENCE = 0.2
    program = mw.compile(make(dropout=0.2), mw.Plan.parse(PLAN), example=batch())
    target, log = folder / "target", folder / "losses"
    dice = random.Random(num_kills)
    for number in range(num_kills):
        killed(program, target, log, dice, soon=number % 5 != 0)
    last = max(step for step, _ in losses(log, 0)) + 3
    assert ended(started(program, target, log, last), 120) == [0, 0]
    names = {path.name for path in target.iterdir()}
    assert names == {f"step-{last - back}" for back in range(3)}, names
    whole = folder / "whole"
    assert ended(started(program, folder / "other", whole, last), 300) == [0, 0]
    expected = dict(losses(whole, 0))
    found = [each for rank in range(2) for each in losses(log, rank)]
    right = sum(expected[step] == loss for step, loss in found)
    assert {step for step, _ in found} == expected.keys()
    print(f"{right} of {len(found)} losses right")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
