"""A rank of `test_several_runs.py`: runs at once, one after another, and in threads."""

from __future__ import annotations

import os
import threading

import torch

import meshwright as mw
from tests.runtime.mishaps import compiled
from tests.runtime.models import batch


def program() -> mw.Program:
    return compiled(int(os.environ["WORLD_SIZE"]))


def losses(run: mw.Run, steps: int = 2) -> list[float]:
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    found = []
    for number in range(steps):
        found.append(run.step(*batch(number))[0].item())
        optimizer.step()
        optimizer.zero_grad()
    return found


def at_once(expected: list[float]) -> None:
    """Two runs of one program, each with its own weights and groups."""
    with program().launch() as one, program().launch() as other:
        for _ in range(2):
            one.step(*batch(0))
        assert losses(other) == expected


def after_a_failure(expected: list[float]) -> None:
    """A script may catch what ended a run, on every rank, and launch again."""
    rank = int(os.environ["RANK"])
    for culprit in (1, 0):
        ended: Exception | None = None
        try:
            with program().launch() as run:
                run.step(*batch(0))
                if rank == culprit:
                    raise ZeroDivisionError("the loss scale is 0")
                for _ in range(1000):
                    run.step(*batch(0))
        except (ZeroDivisionError, mw.RunError) as error:
            ended = error
        if rank != culprit:
            expected_text = f"rank {culprit} failed: ZeroDivisionError: the loss scale is 0\n"
            assert str(ended).startswith(expected_text), ended
        with program().launch() as run:
            assert losses(run) == expected


def in_a_thread(expected: list[float]) -> None:
    """Handlers of signals are for the main thread; nothing else is."""
    found: list[list[float]] = []

    def target() -> None:
        with program().launch() as run:
            found.append(losses(run))

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert found == [expected]


def main() -> None:
    torch.set_num_threads(1)
    with program().launch() as run:
        expected = losses(run)
    at_once(expected)
    after_a_failure(expected)
    in_a_thread(expected)
    print("trained")
