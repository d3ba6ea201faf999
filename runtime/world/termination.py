"""The handling of SIGTERM, which torchrun sends to the other ranks as soon as one has died.

Unhandled, it would end them before they can say which rank they have lost, and in what.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, Protocol

EXIT_CODE = 128 + signal.SIGTERM


def say(text: str) -> None:
    """Write a line to standard error from any thread, without ever waiting for its reader."""
    with contextlib.suppress(OSError):
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        if poller.poll(1000):
            os.write(2, f"{text}\n".encode()[: select.PIPE_BUF])


class Watched(Protocol):
    """What is told of a signal: see `Watch`."""

    waits: Any
    signals: Callable[[], bool]

    def end_as_told(self) -> NoReturn:
        """Tell the others, and raise what ends this rank."""
        ...

    def told_to_stop(self) -> None:
        """Find out why this rank waits; its wait ends it."""
        ...


class Termination:
    """A handler of SIGTERM for as long as a transport is open.

    A rank that waits for others is given time to find out why, and ends when its wait does; any
    other ends at once. A main thread inside a backend runs no Python handler, so the number of the
    signal also goes through a pipe that the watch reads. Does nothing where the script has a
    handler of its own.
    """

    def __init__(self, watch: Watched) -> None:
        self.watch = watch
        self.installed = False
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)
        watch.signals = self._arrived
        self.installed = True
        _installed.append(self)

    def close(self) -> None:
        """Put back what was there before."""
        if not self.installed or threading.current_thread() is not threading.main_thread():
            return
        self.installed = False
        _installed.remove(self)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(self._before)
        os.close(self._read)
        os.close(self._write)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.watch.waits is None:
            self.watch.end_as_told()
        self.watch.told_to_stop()

    def _arrived(self) -> bool:
        try:
            return signal.SIGTERM in os.read(self._read, 64)
        except BlockingIOError:
            return False


_installed: list[Termination] = []


def _leave_to_the_parent() -> None:
    """In a forked child, such as a loader's worker: a signal to it is not one to the rank."""
    if _installed:
        _installed.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
