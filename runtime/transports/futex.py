"""Sleeping until another process changes a number in memory that both map.

The kernel compares the number once more before a process sleeps, so that no change is missed, and
whoever changes it wakes those that sleep. Only Linux on x86-64 is served, as in `shared.py`.
"""

from __future__ import annotations

import ctypes
import mmap

_SYSTEM_CALL = 202
_WAIT, _WAKE = 0, 1
_EVERYONE = (1 << 31) - 1
_LOW_BITS = (1 << 32) - 1
"""The kernel compares 32 bits: those that come first in memory."""


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Futex:
    """The 8-byte numbers of `memory`, by index: sleeping until one changes, and waking others."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._call = ctypes.CDLL(None).syscall
        self._buffer = ctypes.c_char.from_buffer(memory)
        self._start = ctypes.addressof(self._buffer)

    def sleep(self, index: int, seen: int, seconds: float) -> None:
        """Sleep until the number is no longer as it was `seen` or, at the latest, for `seconds`; it
        may end for no reason."""
        most = ctypes.byref(_Time(int(seconds), int(seconds % 1 * 1e9)))
        self._on(index, _WAIT, seen & _LOW_BITS, most)

    def wake(self, index: int) -> None:
        """Wake every process that sleeps until the number changes."""
        self._on(index, _WAKE, _EVERYONE, None)

    def close(self) -> None:
        """Let go of the memory."""
        del self._buffer

    def _on(self, index: int, operation: int, value: int, most: object) -> None:
        place = ctypes.c_void_p(self._start + 8 * index)
        self._call(_SYSTEM_CALL, place, operation, ctypes.c_uint32(value), most, None, 0)
