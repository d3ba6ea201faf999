"""Sleeping until a number in shared memory changes."""

from __future__ import annotations

import mmap
import platform
import threading
import time
from collections.abc import Iterator

import pytest

from meshwright.runtime.transports.futex import Futex

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Linux on x86-64"
)


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, mmap.PAGESIZE) as found:
        yield found


def slept(futex: Futex, index: int, seen: int, seconds: float) -> float:
    begin = time.monotonic()
    futex.sleep(index, seen, seconds)
    return time.monotonic() - begin


def test_a_sleeper_is_woken_by_whoever_changes_the_number(memory: mmap.mmap) -> None:
    futex = Futex(memory)
    words = memoryview(memory).cast("q")

    def change() -> None:
        words[3] = 7 << 27
        futex.wake(3)

    timer = threading.Timer(0.1, change)
    timer.start()
    assert 0.05 < slept(futex, 3, 0, 20.0) < 10
    timer.join()
    words.release()
    futex.close()


def test_nobody_sleeps_after_a_change_nor_longer_than_asked_for(memory: mmap.mmap) -> None:
    futex = Futex(memory)
    assert slept(futex, 0, 1, 20.0) < 10
    assert 0.05 < slept(futex, 0, 0, 0.1) < 10
    futex.close()
