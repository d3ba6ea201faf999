"""The bytes that are alive while a rank runs its schedule: how many, when, and what for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple, TypeAlias

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.report.memory.tensors import Held, Storage, Use, leaves
from meshwright.compiler.schedules.actions import Entry

_Place: TypeAlias = "tuple[int, int, Entry | None, Node | None]"
"""Where a step has come to: how long the log was, the bytes inside a call, and what ran."""


class Mark(NamedTuple):
    """An entry of the schedule and an instruction of its graph, of `node` if of any: the most bytes
    alive while it ran, and those after it."""

    entry: Entry
    node: Node | None
    most: int
    alive: int


class Tally:
    """The storages that are held. `peak` is the most bytes alive at once; `first_peak` is the most
    where the first step makes what later ones keep, which is not in `peak`. All of these are of the
    device; `most_away` has the most bytes in host memory (`host`) and in files (`disk`)."""

    def __init__(self) -> None:
        self.alive = self.peak = self.first_peak = 0
        self.most_away = Counter[str]()
        self._away = Counter[str]()
        self.entry: Entry | None = None
        self.node: Node | None = None
        """What runs, by the schedule and in its graph."""
        self.marks: list[Mark] = []
        """After every instruction and every entry."""
        self._most = 0
        self._log: list[tuple[Storage, Use | None]] = []
        """What began or ceased to be alive, in order, and what serves another use."""
        self._top = self._first = self._place(0)

    def hold(self, held: Held) -> None:
        """Count what nothing else holds yet."""
        for local in leaves(held):
            local.storage.held += 1
            if local.storage.held == 1:
                self._add(local.storage, local.storage.num_bytes)
        self.reach()

    def release(self, held: Held) -> None:
        """Let go of what nothing else holds."""
        for local in leaves(held):
            local.storage.held -= 1
            if not local.storage.held:
                self._add(local.storage, -local.storage.num_bytes)

    def _add(self, storage: Storage, num_bytes: int) -> None:
        if storage.place == "device":
            self.alive += num_bytes
            self._log.append((storage, None))
        else:
            self._away[storage.place] += num_bytes
            self.most_away |= self._away

    def serve(self, held: Held, use: Use) -> None:
        """Note that what was under way has come, and what it is for from now on."""
        for local in leaves(held):
            if local.storage.use is Use.COMMUNICATION:
                self._log.append((local.storage, use))

    def reach(self, inside: int = 0) -> None:
        """Note how many bytes are alive, with those that a call holds while it runs."""
        size = self.alive + inside
        self._most = max(self._most, size)
        if size > self.peak:
            self.peak, self._top = size, self._place(inside)

    def reach_first(self, inside: int) -> None:
        """The same of a call that only the first step makes."""
        if self.alive + inside > self.first_peak:
            self.first_peak, self._first = self.alive + inside, self._place(inside)

    def mark(self) -> None:
        """Note the most that was alive since the last mark, and what is alive now."""
        assert self.entry is not None
        self.marks.append(Mark(self.entry, self.node, self._most, self.alive))
        self._most = self.alive

    def _place(self, inside: int) -> _Place:
        return len(self._log), inside, self.entry, self.node

    def peak_at(self, *, first: bool = False) -> str:
        """The entry of the schedule and the node at the peak: `backward 0, mm_3`."""
        _, _, entry, node = self._first if first else self._top
        where = f"{entry}, {node.name}" if node is not None else str(entry)
        return f"{where} of the first step" if first else where

    def at_peak(self, *, first: bool = False) -> dict[Storage, Use]:
        """What is alive at the peak, or that of the first step, and what it is for, but for what
        outlives the step."""
        end, inside, _, node = self._first if first else self._top
        return {**self._alive_at(end), Storage(inside, node): Use.TEMPORARIES}

    def left(self) -> Iterable[Storage]:
        """What is alive now."""
        return self._alive_at(len(self._log))

    def end(self, left: Collection[Storage]) -> None:
        """Let go of everything but what is left."""
        for storage in set(self.left()) - set(left):
            self._add(storage, -storage.num_bytes)

    def _alive_at(self, end: int) -> dict[Storage, Use]:
        """What is alive where the log was so long."""
        found: dict[Storage, Use] = {}
        for storage, use in self._log[:end]:
            if use is not None:
                found[storage] = use
            elif storage in found:
                del found[storage]
            else:
                found[storage] = storage.use
        return found
