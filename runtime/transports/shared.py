"""Small collectives between processes of one host, through memory that they share.

A member copies its operand into a slot of its own and publishes the slot's number; the others see
the number and read the slot. No thread and no system call is in between, where a message over
Gloo's sockets wakes two threads. The bytes are in place before the number because x86-64 keeps the
order of plain stores and of plain loads. Python has no fences, so other processors use Gloo.

Where a host has more ranks than cores, a member that waits sleeps in the kernel until the number
changes: polling would take the core from a rank that computes.

The memory is an unnamed file that the others open through its creator's `/proc` entry: it is gone
with the last process that maps it, however that ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from meshwright.compiler.layout.wires import WIRES, Wire, receive
from meshwright.runtime.errors import CALL_SAME_METHODS, MismatchError
from meshwright.runtime.transports.futex import Futex
from meshwright.runtime.transports.gloo import KIB, MIB, GlooGroup
from meshwright.runtime.transports.native import Begun

SLOTS = 8
"""The slots of a member: as many as a cache line has 8-byte numbers."""
_WORDS = 32
"""The numbers of a member: 8 published, 8 consumed, and a gap before those of the next one."""
_STAGGER = 4 * KIB + 64
"""Between slots, so that their first bytes do not compete for the same lines of a cache."""
_KIND_BITS, _SIZE_BITS = 6, 21
_TAG_BITS = _KIND_BITS + _SIZE_BITS
"""Of the word that members compare: the kind of wire, and the bytes of an operand."""
_SPIN_SECONDS, _YIELD_SECONDS = 50e-6, 1e-3
_SHORTEST_SLEEP, _LONG_SLEEP, _LONGEST_SLEEP = 1e-6, 100e-6, 2e-3
_MAX_VIEWS = 4096


def slot_bytes(size: int) -> int:
    """The largest operand that a group of `size` members moves through shared memory."""
    return max(64 * KIB, min(MIB, 4 * MIB // size))


@dataclass(eq=False, slots=True)
class _Operation:
    """One collective of this member until it is waited for; every member publishes its `word`."""

    wire: Wire
    tensor: Tensor
    donate: bool
    number: int
    slot: int
    word: int
    targets: Sequence[int]
    sources: Sequence[int]
    published: bool = False
    result: Tensor | None = None


class SharedGroup:
    """The processes of one group, all on this host; `large` moves what does not fit a slot.

    A start never waits: where a member still reads the slot, the operand follows once it is free,
    carried by a thread that is started then. `crowded`, the same for every member, says that the
    host has more ranks than cores.
    """

    def __init__(
        self, large: GlooGroup, memory: mmap.mmap, processes: Sequence[int], crowded: bool
    ) -> None:
        self.large, self.crowded = large, crowded
        self.members, self.size, self.position = large.members, large.size, large.position
        self.limit = slot_bytes(self.size)
        self.processes = tuple(processes)
        self._poller = select.poll()
        for place in large.others:
            self._poller.register(self.processes[place], select.POLLIN)
        self._memory = memory
        self._words = memoryview(memory)[: self.size * _WORDS * 8].cast("q")
        self._futex = Futex(memory)
        self._views: dict[Any, list[Tensor]] = {}
        self._number = 0
        self._own: list[_Operation | None] = [None] * SLOTS
        self._deferred: deque[_Operation] = deque()
        self._lock, self._kick = threading.Lock(), threading.Event()
        self._carrier: threading.Thread | None = None
        self._ended = False

    def begin(self, wire: Wire, tensor: Tensor, started: bool, donate: bool) -> Begun:
        """Publish the operand; the function that is returned waits for the others."""
        if WIRES[wire.kind].counted or tensor.nbytes > self.limit:
            return self.large.begin(wire, tensor, started, donate)
        if not tensor.is_contiguous():
            tensor, donate = tensor.contiguous(), True
        if tensor.requires_grad:
            tensor = tensor.detach()
        self._number = number = self._number + 1
        word = number << _TAG_BITS | tensor.nbytes << _KIND_BITS | _kind_number(wire.kind)
        peers = WIRES[wire.kind].peers(wire, self.position, self.large.others)
        operation = _Operation(wire, tensor, donate, number, number % SLOTS, word, *peers)
        if self._deferred or not self._free(number):
            self._defer(operation)
        else:
            self._publish(operation)
        return [], partial(self._finish, operation)

    def abort(self) -> None:
        """Make a thread that waits for another member return with an error."""
        self._ended = True
        self.large.abort()

    def close(self) -> None:
        """Let go of the memory and the connections."""
        self._ended = True
        self._kick.set()
        if self._carrier is not None:
            self._carrier.join()
        self._views.clear()
        self._words.release()
        self._futex.close()
        # A view may live on in a traceback; the memory then goes with it.
        with contextlib.suppress(BufferError):
            self._memory.close()
        for descriptor in self.processes:
            os.close(descriptor)
        self.large.close()

    def parts(self, operation: _Operation) -> list[Tensor]:
        """Every member's operand or, where operands are divided, its part for this member."""
        tensor, place = operation.tensor, self.position
        divided = WIRES[operation.wire.kind].divided
        parts = self._view(operation.slot, tensor, place if divided else -1).copy()
        parts[place] = tensor[place] if divided else tensor
        return parts

    def _view(self, slot: int, like: Tensor, part: int = -1) -> list[Tensor]:
        """Every member's slot with the dtype and shape of `like`, or that part of it."""
        key = (slot, like.dtype, like.shape, part)
        found = self._views.get(key)
        if found is not None:
            return found
        if len(self._views) >= _MAX_VIEWS:
            self._views.clear()
        start = _offset(self.size, 0, slot)
        stride = _offset(self.size, 1, slot) - start
        # Views made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            views = [
                torch.frombuffer(
                    self._memory, dtype=like.dtype, count=like.numel(), offset=start + m * stride
                ).view(like.shape)
                for m in range(self.size)
            ]
            if part >= 0:
                views = [view[part] for view in views]
        self._views[key] = views
        return views

    def _free(self, number: int) -> bool:
        """Whether every member is done with what the slot held before operation `number`."""
        words, before, first = self._words, number - SLOTS, 8 + number % SLOTS
        return all(words[index] >= before for index in range(first, len(words), _WORDS))

    def _publish(self, operation: _Operation) -> None:
        slot = operation.slot
        self._own[slot] = operation
        if operation.targets:
            self._view(slot, operation.tensor)[self.position].copy_(operation.tensor)
        index = self.position * _WORDS + slot
        self._words[index] = operation.word
        operation.published = True
        if self.crowded:
            self._futex.wake(index)

    def _take(self, operation: _Operation) -> None:
        wire, divided = operation.wire, WIRES[operation.wire.kind].divided
        out = operation.tensor if operation.donate and not divided else None
        operation.result = receive(wire, self.position, self.parts(operation), out)
        self._own[operation.slot] = None
        self._words[self.position * _WORDS + 8 + operation.slot] = operation.number

    def _finish(self, operation: _Operation) -> Tensor:
        words, slot, word = self._words, operation.slot, operation.word
        if not operation.published:
            self._poll(lambda: self._carried(operation), operation, self.large.others)
        for place in operation.sources if operation.result is None else ():
            index = place * _WORDS + slot
            if words[index] != word:
                self._await(index, operation, place)
        with self._lock:
            if operation.result is None:
                self._take(operation)
        assert operation.result is not None
        return operation.result

    def _await(self, index: int, operation: _Operation, place: int) -> None:
        """Wait until a peer's number is there, at first in a tight loop."""
        words, word = self._words, operation.word

        def there() -> bool:
            return operation.result is not None or words[index] == word

        if self.crowded:
            self._sleep(index, there, operation, place)
            return
        end = time.perf_counter() + _SPIN_SECONDS
        while time.perf_counter() < end:
            for _ in range(8):
                if words[index] == word:
                    return
        self._poll(there, operation, (place,))

    def _sleep(
        self, index: int, there: Callable[[], bool], operation: _Operation, place: int
    ) -> None:
        """Sleep until `there`, which only the member in `place` can make so by a new number."""
        seen = self._words[index]
        while not there():
            self._futex.sleep(index, seen, _LONGEST_SLEEP)
            if self._words[index] == seen:
                self._check(there, operation, (place,))
            seen = self._words[index]

    def _poll(
        self, there: Callable[[], bool], operation: _Operation, places: Sequence[int]
    ) -> None:
        """Wait until `there`; raises once the members in `places` can no longer make it so."""
        begin = now = time.perf_counter()
        yielding = 0.0 if self.crowded else _YIELD_SECONDS
        while now < begin + yielding:
            os.sched_yield()
            if there():
                return
            now = time.perf_counter()
        pause = _SHORTEST_SLEEP
        while True:
            time.sleep(pause)
            # A wait of seconds need not end within microseconds.
            longest = max(_LONG_SLEEP, (time.perf_counter() - begin) / 50)
            pause = min(2 * pause, longest, _LONGEST_SLEEP)
            if there():
                return
            self._check(there, operation, places)

    def _check(
        self, there: Callable[[], bool], operation: _Operation, places: Sequence[int]
    ) -> None:
        """Raise where the members in `places` can no longer make it so that it is `there`."""
        gone = self._gone(places)
        # A member that has ended may have published before.
        if there():
            return
        if self._ended or gone:
            raise RuntimeError("connection through shared memory: the other process has ended")
        self._compare(operation, places)

    def _gone(self, places: Sequence[int]) -> bool:
        ended = {descriptor for descriptor, _ in self._poller.poll(0)}
        return any(self.processes[place] in ended for place in places)

    def _compare(self, operation: _Operation, places: Sequence[int]) -> None:
        for place in places:
            word = self._words[place * _WORDS + operation.slot]
            if word >> _TAG_BITS == operation.number and word != operation.word:
                ours, theirs = _spell(operation.word), _spell(word)
                rank, peer = self.members[self.position], self.members[place]
                raise MismatchError(
                    "members of a group asked for different operations",
                    rank=rank,
                    peers=(peer,),
                    where=(f"rank {rank}: {ours}", f"rank {peer}: {theirs}"),
                    help=CALL_SAME_METHODS,
                )

    def _defer(self, operation: _Operation) -> None:
        with self._lock:
            self._deferred.append(operation)
        self._kick.set()
        if self._carrier is None:
            self._carrier = threading.Thread(target=self._carry, name="shared memory", daemon=True)
            self._carrier.start()

    def _carry(self) -> None:
        while not self._ended:
            with self._lock:
                self._advance()
                if not self._deferred:
                    self._kick.clear()
            self._kick.wait()
            time.sleep(_LONG_SLEEP)

    def _carried(self, operation: _Operation) -> bool:
        with self._lock:
            self._advance()
        return operation.published

    def _advance(self) -> None:
        """Publish deferred operands, in order; results that hold up a slot are taken early."""
        while self._deferred:
            operation = self._deferred[0]
            before = self._own[operation.slot]
            if before is not None and self._ready(before):
                # Outside the caller's inference mode the carrier could not write to the operand.
                with torch.inference_mode(before.tensor.is_inference()):
                    self._take(before)
            if not self._free(operation.number):
                return
            self._publish(operation)
            self._deferred.popleft()

    def _ready(self, operation: _Operation) -> bool:
        slot, word = operation.slot, operation.word
        return all(self._words[place * _WORDS + slot] == word for place in operation.sources)


def _offset(size: int, member: int, slot: int) -> int:
    """Where a slot begins, in bytes."""
    stride = slot_bytes(size) + _STAGGER
    return size * _WORDS * 8 + (member * SLOTS + slot) * stride


def _spell(word: int) -> str:
    tag = word & (1 << _TAG_BITS) - 1
    return f"{list(WIRES)[tag & (1 << _KIND_BITS) - 1]} of {tag >> _KIND_BITS} bytes"


@cache
def _kind_number(kind: str) -> int:
    return list(WIRES).index(kind)


def share(store: Store, large: GlooGroup, wanted: bool, ranks_here: int) -> SharedGroup | GlooGroup:
    """Shared memory before `large` where all members want it, are on one host and can attach.

    `ranks_here` is the number of ranks on this host. All members come to one decision, also about
    whether they are crowded: one that may use fewer cores than others makes it so.
    """
    store.set(f"host/{large.position}", f"{host_name()} {os.getpid()}" if wanted else "no 0")
    hosts = [text.decode().rpartition(" ") for text in _all(store, "host", large.size)]
    if len({host for host, _, _ in hosts}) > 1 or hosts[0][0] == "no":
        return large
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as kept:
        file = _file(store, large, int(hosts[0][2]), opened)
        attached = _attach(file, large.size, [int(process) for _, _, process in hosts], kept)
        fits = "yes" if ranks_here <= len(os.sched_getaffinity(0)) else "crowded"
        store.set(f"attached/{large.position}", "no" if attached is None else fits)
        answers = _all(store, "attached", large.size)
        if b"no" in answers or attached is None:
            return large
        kept.pop_all()
    return SharedGroup(large, *attached, b"crowded" in answers)


def _all(store: Store, key: str, size: int) -> list[bytes]:
    keys = [f"{key}/{place}" for place in range(size)]
    store.wait(keys)
    return store.multi_get(keys)


def host_name() -> str:
    """A text that is the same for processes that can share memory and see each other end."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "no"
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "no"


def _file(store: Store, large: GlooGroup, first: int, opened: contextlib.ExitStack) -> int:
    """A descriptor, open for as long as `opened`, of the file that process `first` makes; or -1."""
    number = -1
    if large.position == 0:
        with contextlib.suppress(OSError):
            number = os.memfd_create("meshwright")
            opened.callback(os.close, number)
        store.set("file", str(number))
        return number
    number = int(store.get("file"))
    if number >= 0:
        with contextlib.suppress(OSError):
            number = os.open(f"/proc/{first}/fd/{number}", os.O_RDWR)
            opened.callback(os.close, number)
            return number
    return -1


def _attach(
    file: int, size: int, processes: Sequence[int], kept: contextlib.ExitStack
) -> tuple[mmap.mmap, list[int]] | None:
    """The memory, and for each member a descriptor that tells its end; None if something fails."""
    if file < 0:
        return None
    num_bytes = _offset(size, size, 0)
    descriptors = []
    try:
        # Every member does it, so that none maps a file that is still empty.
        os.ftruncate(file, num_bytes)
        memory = mmap.mmap(file, num_bytes)
        kept.callback(memory.close)
        for process in processes:
            descriptors.append(os.pidfd_open(process))
            kept.callback(os.close, descriptors[-1])
    except OSError:
        return None
    return memory, descriptors
