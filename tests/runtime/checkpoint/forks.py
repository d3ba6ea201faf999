"""Jobs as forks of one process that has compiled their program: starting one takes no time."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch

import meshwright as mw
from tests.runtime.checkpoint.states import fill
from tests.runtime.models import PLANS, batch, make

Job = tuple[mw.Run, torch.optim.Optimizer]


def compiled() -> mw.Program:
    """A program for two ranks without padding, so that a number that fills the state is all that is
    saved."""
    torch.set_num_threads(1)
    return mw.compile(make(), mw.Plan.parse(PLANS["sequence"]), example=batch())


def launched(program: mw.Program, number: int) -> Job:
    """A run whose state, the optimizer's too, is all one number."""
    run = program.launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
    run.step(*batch())
    optimizer.step()
    optimizer.zero_grad()
    fill(run, optimizer, number)
    return run, optimizer


def forked(function: Callable[[], None]) -> int:
    """The id of a process that runs the function, and then ends with 0, or 1 for an error."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def become(rank: int, num_ranks: int, port: int) -> None:
    """Set what torchrun would: runs that this process launches are of that rank."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def ended(children: Sequence[int], seconds: float) -> list[int]:
    """The statuses of forked processes as `waitstatus_to_exitcode` has them; late ones are killed.

    Their status is then -9, as of those that the caller killed.
    """
    deadline = time.monotonic() + seconds
    statuses = []
    for child in children:
        found, status = os.waitpid(child, os.WNOHANG)
        while not found and time.monotonic() < deadline:
            time.sleep(0.005)
            found, status = os.waitpid(child, os.WNOHANG)
        if not found:
            os.kill(child, 9)
            _, status = os.waitpid(child, 0)
        statuses.append(os.waitstatus_to_exitcode(status))
    return statuses
