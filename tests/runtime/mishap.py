"""A rank of `test_watch.py`: sums round after round, until what the scenario says happens."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from typing import Any

import torch

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire
from meshwright.runtime.transports.process import ProcessMesh

NAMES = ("hidden_sum", "loss_sum")
ROW, COLUMN = Wire("all_reduce", ("tp",), index=0), Wire("all_reduce", ("dp",), index=1)
PATIENCE = 2.0
Program = Generator[Any, Any, Any]


def train(rounds: int, size: int = 8) -> Program:
    value = torch.ones(size)
    for _ in range(rounds):
        value = yield ROW, value / 2
        value = yield COLUMN, value
    return value


def fails() -> Program:
    yield from train(20)
    raise ZeroDivisionError("the loss scale is 0")


def signalled(number: signal.Signals) -> Program:
    yield from train(20)
    os.kill(os.getpid(), number)
    yield from train(20)


def told_while_it_waits() -> Program:
    """The others come to the collective a while after rank 1 was told to stop in it."""
    yield from train(20)
    if os.environ["RANK"] == "1":
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        time.sleep(1.0)
    yield from train(20)


def slow() -> Program:
    yield from train(20)
    time.sleep(2 * PATIENCE)
    begin = time.monotonic()
    while time.monotonic() - begin < PATIENCE:
        sum(range(1000))
    yield from train(20)


def turned() -> Program:
    yield from train(20)
    value = torch.ones(8)
    yield COLUMN, value
    yield ROW, value


SCENARIOS = {
    "dies": lambda: signalled(signal.SIGKILL),
    "stands still": lambda: signalled(signal.SIGSTOP),
    "fails": fails,
    "finishes": lambda: train(20),
    "hangs in a backend": lambda: signalled(signal.SIGSTOP),
    "is slow": slow,
    "is told to stop": told_while_it_waits,
    "turns round": turned,
}


def main(culprits: str, scenario: str) -> None:
    torch.set_num_threads(1)
    mesh = Mesh((("dp", int(os.environ["WORLD_SIZE"]) // 2), ("tp", 2)))
    transport = ProcessMesh(mesh, period=0.4, patience=PATIENCE)
    own = str(transport.rank) in culprits.split(",")
    digest = "ab" if scenario == "compiles differently" and own else "cd"
    transport.check_same_program(digest * 32)
    if scenario == "hangs in a backend":
        # What a backend that cannot be interrupted looks like.
        for axis in mesh.names:
            transport.collective(Wire("all_reduce", (axis,)), torch.zeros(1))
        transport.watch.aborts.clear()
    program = SCENARIOS[scenario]() if own and scenario in SCENARIOS else train(40)
    transport.run([program], NAMES)
    print("trained")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
