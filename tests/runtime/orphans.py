"""A rank of `test_launcher.py`: it says that it is there, and would then go on for minutes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import torch

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire
from meshwright.runtime.transports.process import ProcessMesh
from meshwright.runtime.world import launcher

MINUTES = 120.0


def transport() -> ProcessMesh:
    mesh = Mesh((("tp", int(os.environ["WORLD_SIZE"])),))
    found = ProcessMesh(mesh)
    found.collective(Wire("all_reduce", ("tp",)), torch.ones(3))
    return found


def not_launched() -> None:
    """A rank that has compiled and not launched."""
    launcher.guard()
    here()
    time.sleep(MINUTES)


def rendezvous() -> None:
    """Ranks that wait for one that never comes."""
    here()
    if os.environ["RANK"] == "0":
        transport()
    launcher.guard()
    time.sleep(MINUTES)


def step() -> None:
    """The others wait for rank 0, which computes."""
    mesh = transport()
    here()
    if os.environ["RANK"] == "0":
        time.sleep(MINUTES)
    mesh.collective(Wire("all_reduce", ("tp",)), torch.ones(3))


def gloo() -> None:
    """The same as `step`, over sockets."""
    os.environ["MESHWRIGHT_SHARED_MEMORY"] = "0"
    step()


def computes() -> None:
    """A rank that computes in Python without a pause."""
    transport()
    here()
    end = time.monotonic() + MINUTES
    while time.monotonic() < end:
        sum(range(100))


def operator() -> None:
    """A rank in an operator that returns to Python after minutes."""
    transport()
    here()
    weight = torch.randn(2000, 2000)
    torch.linalg.multi_dot([weight] * 10_000)


def stubborn() -> None:
    """A script that catches and ignores every exception."""
    transport()
    here()
    end = time.monotonic() + MINUTES
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)


def handles() -> None:
    """A script with its own handler of SIGTERM, which does not end it."""
    signal.signal(signal.SIGTERM, lambda number, frame: print("handled", flush=True))
    stubborn()


def detached() -> None:
    """A process that `nohup` starts outlives the one that called it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    not_launched()


def session() -> None:
    """So does a process that `setsid` starts."""
    os.setsid()
    not_launched()


def loader() -> None:
    """A loader's process is told to stop; the rank is not."""
    rank = transport()
    child = os.fork()
    if not child:
        here()
        time.sleep(MINUTES)
    while not Path(os.environ["CELL"], "0").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert not rank.watch.signals()
    print("goes on")


def here() -> None:
    folder = Path(os.environ["CELL"])
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{os.getpid()}.new"
    temporary.write_text(str(os.getpid()))
    temporary.rename(folder / os.environ["RANK"])


MODES = {
    mode.__name__: mode
    for mode in (
        *(not_launched, rendezvous, step, gloo, computes, operator),
        *(stubborn, handles, detached, session, loader),
    )
}


def main(mode: str) -> None:
    torch.set_num_threads(1)
    MODES[mode]()


if __name__ == "__main__":
    main(*sys.argv[1:])
