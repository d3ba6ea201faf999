"""What can befall one rank of a run, and when: `main` of every rank of `test_faults.py`.

Arguments: what, when, and the rank that it befalls. Everyone else trains as usual.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch

import meshwright as mw
from meshwright.runtime.transports.process import ProcessMesh
from tests.runtime.models import PLANS, batch, make

PERIOD, PATIENCE = 0.4, 2.0
"""Seconds of the heartbeat in these tests; a run has 1 and 5."""
STEPS = 3


@cache
def compiled(num_ranks: int, extra: str = "") -> mw.Program:
    """The program of every rank; forked ranks have it already."""
    plan = PLANS["tensor" if num_ranks == 2 else "both"] + extra
    return mw.compile(make(), mw.Plan.parse(plan), example=batch(), outputs=["logits"])


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise ZeroDivisionError("the loss scale is 0")


MISTAKES = (
    *("another program", "another shape", "another call", "other inputs"),
    *("fewer steps", "more steps"),
)
FAULTS: dict[str, Callable[[], object]] = {
    "kill": send(signal.SIGKILL),
    "stop": send(signal.SIGSTOP),
    "raise": fail,
    "exit": lambda: sys.exit(0),
    "exit 3": lambda: sys.exit(3),
    "_exit": lambda: os._exit(0),
    "terminate": send(signal.SIGTERM),
    "interrupt": send(signal.SIGINT),
    "segfault": send(signal.SIGSEGV),
    "abort": send(signal.SIGABRT),
}
PHASES = {
    "before launch": "",
    "in compile": "/passes/",
    "in launch": "/runtime/",
    "while connecting": "/runtime/transports/gloo.py:GlooGroup.__init__",
    "in step": "<meshwright ",
    "between steps": "",
    "in optimizer.step": "/torch/optim/",
    "in evaluate": "/runtime/",
    "in save": "/runtime/",
    "in load": "/runtime/",
    "in check": "/runtime/",
    "in close": "/runtime/",
}
"""The phases, and where in the code a mishap strikes: in the first call of a function, and after a
few calls in a folder."""
CALLS = 5


class Mishap:
    """Strikes once, in its phase, if this rank is the culprit."""

    def __init__(self, what: str, when: str, here: bool) -> None:
        self.what, self.when, self.here = what, when, here

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A context in which it may strike."""
        if phase != self.when:
            yield
            return
        strikes = self.here and self.what in FAULTS
        if strikes and not PHASES[phase]:
            FAULTS[self.what]()
        elif strikes:
            sys.setprofile(self._counting(PHASES[phase]))
        try:
            yield
        finally:
            sys.setprofile(None)

    def _counting(self, where: str) -> Callable[[FrameType, str, Any], None]:
        left = [CALLS if where.endswith("/") else 1]

        def profile(frame: FrameType, event: str, arg: Any) -> None:
            code = frame.f_code
            if event == "call" and where in f"{code.co_filename}:{code.co_qualname}":
                left[0] -= 1
                if not left[0]:
                    sys.setprofile(None)
                    FAULTS[self.what]()

        return profile

    def differs(self, what: str) -> bool:
        """Whether this rank does something other than the others, and `what` that is."""
        return self.here and self.what == what


def train(mishap: Mishap, num_ranks: int) -> None:
    """Everything that a training script does."""
    with mishap.during("before launch"):
        pass
    with mishap.during("in compile"):
        if mishap.when == "in compile":
            compiled.cache_clear()
        extra = "\nsequence blocks.* over tp" if mishap.differs("another program") else ""
        program = compiled(num_ranks, extra)
    with mishap.during("in launch"), mishap.during("while connecting"):
        run = program.launch(new_shapes="compile")
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    for number in range(STEPS):
        step(mishap, run, number)
        with mishap.during("in optimizer.step"):
            optimizer.step()
            optimizer.zero_grad()
        with mishap.during("between steps"):
            pass
        if number == 1 and mishap.differs("fewer steps"):
            break
    if mishap.differs("more steps"):
        run.step(*batch())
    wind_up(mishap, run, optimizer)


def step(mishap: Mishap, run: mw.Run, number: int) -> None:
    last = number == STEPS - 1
    if last and mishap.differs("another call"):
        run.forward(*batch())
    with mishap.during("in step"):
        run.step(
            *batch(
                seed=2 if mishap.differs("other inputs") else 1,
                rows=4 if last and mishap.differs("another shape") else 8,
            )
        )


def wind_up(mishap: Mishap, run: mw.Run, optimizer: torch.optim.Optimizer) -> None:
    folder = os.environ["CELL"]
    with mishap.during("in evaluate"):
        run.evaluate(*batch())
    with mishap.during("in save"):
        run.save(folder, optimizer)
    with mishap.during("in load"):
        run.load(folder, optimizer)
    with mishap.during("in check"):
        run.check(optimizer)
    with mishap.during("in close"):
        run.close()


def main(what: str, when: str, culprit: str) -> None:
    torch.set_num_threads(1)
    ProcessMesh.__init__.__kwdefaults__.update(period=PERIOD, patience=PATIENCE)
    train(Mishap(what, when, os.environ["RANK"] == culprit), int(os.environ["WORLD_SIZE"]))
    print("trained")


def warm_up() -> None:
    """Compile what every rank trains; what it evaluates, each compiles by itself."""
    torch.set_num_threads(1)
    for num_ranks in (2, 4):
        compiled(num_ranks)
