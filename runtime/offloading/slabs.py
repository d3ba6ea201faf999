"""Blocks of large slabs, of host memory or of files: allocated once, and used again."""

from __future__ import annotations

import mmap
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from meshwright.compiler.graph.text import size_text

T = TypeVar("T")

ALIGNMENT = max(4096, mmap.ALLOCATIONGRANULARITY)
"""The bytes of which blocks begin at a multiple: a page, and the sector of a disk."""
SLAB = 32 << 20
"""The fewest bytes of a slab."""


class Block(Generic[T]):
    """A part of a slab, of `size` bytes from `start`, which is free again when nothing holds it."""

    def __init__(self, slabs: Slabs[T], index: int, start: int, size: int) -> None:
        self.slabs, self.index, self.start, self.size = slabs, index, start, size

    @property
    def slab(self) -> T:
        """What it is a part of."""
        return self.slabs.slabs[self.index]

    def __del__(self) -> None:
        # In whatever thread, and in the middle of anything: an append is one operation.
        self.slabs.returned.append((self.index, self.start, self.size))


class Slabs(Generic[T]):
    """Slabs that `make` makes, given a number of bytes, and what of them is free.

    `in_use` are the bytes that blocks were asked for and hold, `peak` the most so far, and
    `reserved` those of all slabs.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self.make = make
        self.slabs: list[T] = []
        self.free: list[tuple[int, int, int]] = []
        """The slab, start and end of what is free, in order."""
        self.returned: deque[tuple[int, int, int]] = deque()
        """What is free and not yet among it."""
        self.in_use = self.peak = self.reserved = 0

    def __repr__(self) -> str:
        return f"{size_text(self.in_use)} of {size_text(self.reserved)} in use"

    def take(self, size: int) -> Block[T]:
        """A block of `size` bytes, in the first place that has room."""
        while self.returned:
            self._give(*self.returned.popleft())
        length = _aligned(size)
        room = next((i for i, (_, start, end) in enumerate(self.free) if end - start >= length), -1)
        if room < 0:
            room = self._grow(length)
        index, start, end = self.free.pop(room)
        if start + length < end:
            self.free.insert(room, (index, start + length, end))
        self.in_use += size
        self.peak = max(self.peak, self.in_use)
        return Block(self, index, start, size)

    def _grow(self, length: int) -> int:
        """Make a slab with room for `length` bytes; its place among what is free."""
        # Pinned memory comes in powers of two, and a process may have only so many files open.
        size = max(SLAB, 1 << (max(length, self.reserved // 8) - 1).bit_length())
        self.slabs.append(self.make(size))
        self.reserved += size
        self.free.append((len(self.slabs) - 1, 0, size))
        return len(self.free) - 1

    def _give(self, index: int, start: int, size: int) -> None:
        """Take a block back, and join it with what is free on both sides."""
        self.in_use -= size
        insort(self.free, (index, start, start + _aligned(size)))
        place = self.free.index((index, start, start + _aligned(size)))
        for i in (place, place - 1):
            if 0 <= i < len(self.free) - 1:
                (slab, begin, end), (other, after, last) = self.free[i : i + 2]
                if slab == other and end == after:
                    self.free[i : i + 2] = [(slab, begin, last)]


def _aligned(size: int) -> int:
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT
