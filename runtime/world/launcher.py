"""The process that started this rank: once it has ended, so does the rank.

A rank whose agent was killed would train on, or wait, hold its port and its memory, and nobody
would know of it. The process that counts is the one that made this process a rank: torchrun's
agent, mpirun, a script that starts ranks; not a shell, whose jobs outlive it, nor anything that a
process was detached from by `nohup` or `setsid`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

from meshwright.runtime.errors import RunError
from meshwright.runtime.world.termination import EXIT_CODE, say

GRACE_SECONDS = 3.0
"""From asking the main thread to end, as an agent would by SIGTERM, to ending the process."""
_PERIOD = 0.5
_AGENTS = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "mksh", "fish", "tcsh", "csh", "ash", "busybox"}


class _Process:
    """What this process knows of those that started it; made anew in a forked child."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.guarded = False
        self.ends: list[Callable[[RunError], None]] = []


def guard() -> None:
    """Watch the launcher from now on, if this rank has one; at most once per process."""
    if _this.guarded:
        return
    launcher = _launcher(_this.parent)
    if launcher is not None:
        _this.guarded = True
        args = (_this, launcher)
        threading.Thread(target=_watch, args=args, name="launcher watch", daemon=True).start()


def at_end(end: Callable[[RunError], None]) -> Callable[[], None]:
    """Call `end` with the error when the launcher ends; the function returned cancels that."""
    ends = _this.ends
    ends.append(end)
    return lambda: ends.remove(end) if end in ends else None


def _launcher(parent: int) -> int | None:
    """The process whose end ends this one; None if this is not a rank, or is detached."""
    mark = next((name for name in (*_AGENTS, "RANK") if name in os.environ), None)
    if mark is None or parent <= 1 or os.name != "posix":
        return None
    found = _ancestor(parent, f"{mark}={os.environ[mark]}".encode())
    if mark in _AGENTS:
        return found
    detached = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN or os.getsid(0) == os.getpid()
    known = sys.platform == "linux" and _name(found) not in (None, *_SHELLS)
    return found if known and not detached else None


def _ancestor(process: int, mark: bytes) -> int:
    """The nearest ancestor without the mark in its environment: wrappers in between pass it on."""
    while True:
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                marked = mark in file.read().split(b"\0")
            if not marked:
                return process
            with open(f"/proc/{process}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            return process
        if parent <= 1:
            return process
        process = parent


def _name(process: int) -> str | None:
    try:
        with open(f"/proc/{process}/comm") as file:
            return file.read().strip().lstrip("-")
    except OSError:
        return None


def _watch(process: _Process, launcher: int) -> None:
    name = _name(launcher)
    _await_end(process.parent, launcher)
    who = f"process {launcher}{f' (`{name}`)' if name else ''}"
    _leave(process, f"{who}, which started this rank, has ended")


def _await_end(parent: int, launcher: int) -> None:
    """Wait until one of the two has ended."""
    poller = select.poll()
    if hasattr(os, "pidfd_open"):
        try:
            poller.register(os.pidfd_open(launcher), select.POLLIN)
        except ProcessLookupError:
            return
        except OSError:
            # Not every sandbox lets it be called.
            pass
    while os.getppid() == parent and not poller.poll(1000 * _PERIOD):
        pass


def _leave(process: _Process, problem: str) -> None:
    """End this process: the main thread if it can be reached, else all of it."""
    rank = os.environ.get("RANK", "?")
    error = RunError(
        f"rank {rank} ends: {problem}", help="start all ranks again; none can be joined alone"
    )
    say(f"meshwright: {error}")
    for end in list(process.ends):
        end(error)
    if callable(signal.getsignal(signal.SIGTERM)):
        # As the launcher would have done: a handler may have something to save first.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
    elif process.ends:
        time.sleep(GRACE_SECONDS)
    os._exit(EXIT_CODE)


def _begin() -> None:
    _this.__init__()  # type: ignore[misc]  # a forked child knows nothing yet


_this = _Process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)
