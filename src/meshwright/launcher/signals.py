"""Signals to this process while ranks run: noted by handlers, acted on by the launch's loop."""

from __future__ import annotations

import signal
import threading
from collections import deque
from types import FrameType
from typing import Any, Self

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""What ends a launch: a key, a batch system, a closed terminal."""
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)
"""What has a meaning for the script alone, such as a batch system's warning."""


class Signals:
    """Handlers for as long as ranks run; a signal that is ignored (`nohup`) stays so.

    Without effect outside of the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self._arrived: deque[signal.Signals] = deque()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPS, *PASSED_ON, signal.SIGTSTP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append(signal.Signals(number))

    def take(self) -> list[signal.Signals]:
        """The signals that arrived since the last call, in order."""
        taken = []
        while self._arrived:
            taken.append(self._arrived.popleft())
        return taken
