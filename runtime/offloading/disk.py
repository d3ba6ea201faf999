"""Files as a place for a rank's tensors: written and read by a few threads, block by block.

The files have no names: the system removes them when the process is gone, however it ends. Each
thread has one staging buffer, aligned as direct writes want it; where the file system has none,
writes go through its cache. Whatever goes wrong with a file is a `RunError` of the step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from meshwright.compiler.graph.text import size_text
from meshwright.compiler.program import STAGING_BYTES
from meshwright.runtime.errors import RunError
from meshwright.runtime.offloading.memory import bytes_of, flat_of, held, host_bytes, raw
from meshwright.runtime.offloading.slabs import ALIGNMENT, Block, Slabs

NUM_THREADS = 4
"""The most reads and writes of a rank at once."""
CHUNK = STAGING_BYTES // NUM_THREADS
"""The bytes that are read or written at once: the size of a staging buffer."""
_POPULATE_READ = 22
"""Linux's `MADV_POPULATE_READ`, for which Python has no name yet."""


class Moving:
    """A read or write that is under way, of the tensor `source`, which it keeps until `wait`."""

    def __init__(self, source: Any, result: Any, done: Future[None]) -> None:
        self.source, self.result, self.done = source, result, done

    def wait(self) -> Any:
        """The result; raises `RunError` for what went wrong meanwhile."""
        self.done.result()
        self.source = None
        return self.result

    def settle(self) -> None:
        """The result is whole once it has been waited for."""


class Mapping(mmap.mmap):
    """A block of a file in memory, and what is under way there."""

    block: Block[BinaryIO]
    come: Future[None]
    written: Future[None]

    def __new__(cls, block: Block[BinaryIO]) -> Mapping:
        found = super().__new__(cls, block.slab.fileno(), block.size, offset=block.start)
        found.block = block
        found.come, found.written = _done(), _done()
        return found

    def populate(self) -> None:
        """Read all of it; raises `OSError` where the file cannot be read."""
        try:
            self.madvise(_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.madvise(mmap.MADV_WILLNEED)  # Linux before 5.14


class DiskStore:
    """The tensors of one rank in files of the folder `path`, which is made if there is none."""

    def __init__(self, path: str, device: torch.device, rank: int) -> None:
        self.path, self.device, self.rank = Path(path).expanduser(), device, rank
        self.slabs = Slabs(self._file)
        self._threads = ThreadPoolExecutor(NUM_THREADS, "meshwright-offload")
        self._own = threading.local()
        self._mappings: WeakValueDictionary[int, Mapping] = WeakValueDictionary()
        """By address."""

    def __call__(self, tensor: Tensor) -> Moving:
        """Begin to write a tensor."""
        flat = flat_of(tensor).view(torch.uint8)
        block = self.slabs.take(flat.nbytes)
        written = self._begin(self._write, flat, block)
        return Moving(tensor, DiskTensor(self, block, tensor, written), written)

    def __repr__(self) -> str:
        return f"<DiskStore `{self.path}`: {self.slabs}>"

    def fetch(self, block: Block[BinaryIO], written: Future[None]) -> tuple[Tensor, Future[None]]:
        """Begin to read a block once it is written: its bytes, and what ends when they are here."""
        flat = torch.empty(block.size, dtype=torch.uint8, device=self.device)
        return flat, self._begin(self._read, flat, block, written)

    def _begin(self, work: Callable[..., None], flat: Tensor, *args: Any) -> Future[None]:
        """Have a thread do something with a tensor; when it has, it holds none of these."""
        held = [(flat, *args, self._computed())]
        return self._threads.submit(lambda: work(*held.pop()))

    def hold(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in a file, mapped into memory for the CPU; of undefined values."""
        size = bytes_of(shape, dtype)
        if not size:
            return torch.empty(shape, dtype=dtype)
        with self._naming("map a file"):
            mapping = Mapping(self.slabs.take(size))
        tensor = held(mapping, [size], torch.uint8)
        self._mappings[tensor.data_ptr()] = mapping
        return tensor.view(dtype).view(tuple(shape))

    def bring(self, tensor: Tensor) -> Moving:
        """Begin to read a tensor that stays here to the device as well."""
        mapping, flat = self._mapping(tensor), flat_of(tensor)
        back = torch.empty(flat.shape, dtype=tensor.dtype, device=self.device)
        if mapping is None or flat.nbytes != mapping.block.size:
            back.copy_(flat)  # a part, or a copy in another layout
            return Moving(tensor, back.as_strided(tensor.shape, tensor.stride()), _done())
        done = self._begin(self._read, back.view(torch.uint8), mapping.block, mapping.written)
        return Moving(tensor, back.as_strided(tensor.shape, tensor.stride()), done)

    def carry(self, tensor: Tensor, home: Tensor) -> Moving:
        """Begin to write a tensor of the device to one that is here."""
        mapping, flat = self._mapping(home), tensor.view(torch.uint8)
        assert mapping is not None
        mapping.written = self._begin(self._write, flat, mapping.block)
        return Moving(tensor, home, mapping.written)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor stays here."""
        return self._mapping(tensor) is not None

    def ahead(self, tensor: Tensor) -> None:
        """Begin to read a tensor for the CPU, if it stays here."""
        mapping = self._mapping(tensor)
        if mapping is not None:
            mapping.come = self._threads.submit(self._read_ahead, mapping)

    def wait(self, tensor: Tensor) -> None:
        """Wait until it is read."""
        mapping = self._mapping(tensor)
        if mapping is not None:
            mapping.come.result()

    def settle(self, tensor: Tensor) -> None:
        """Begin to write back what the CPU has changed of it, and to let go of its memory."""
        mapping = self._mapping(tensor)
        if mapping is not None:
            mapping.written = self._threads.submit(self._write_back, mapping)

    def _mapping(self, tensor: Tensor) -> Mapping | None:
        """Where a tensor is; None for one that was put in its place."""
        return self._mappings.get(tensor.untyped_storage().data_ptr())

    def _read_ahead(self, mapping: Mapping) -> None:
        mapping.written.result()
        with self._naming("read"):
            mapping.populate()

    def _write_back(self, mapping: Mapping) -> None:
        with self._naming("write"):
            mapping.flush()
            mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the files, once what is under way has ended."""
        self._threads.shutdown(wait=True)
        for file in self.slabs.slabs:
            file.close()

    def _computed(self) -> torch.cuda.Event | None:
        """An event at the end of what the device computes so far."""
        if self.device.type != "cuda":
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def _file(self, num_bytes: int) -> BinaryIO:
        """A file without a name, of so many bytes that it has already."""
        with self._naming("make a file"):
            self.path.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self.path, buffering=0)  # noqa: SIM115
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            self._make_direct(file)
        return file

    def _make_direct(self, file: Any) -> None:
        """Have reads and writes of a file go around the system's cache, where it can."""
        number = file.fileno()
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        try:
            fcntl.fcntl(number, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.pwrite(number, raw(host_bytes(ALIGNMENT, pinned=False)), 0)
        except OSError:
            fcntl.fcntl(number, fcntl.F_SETFL, flags)

    @property
    def _staging(self) -> Tensor:
        """The staging buffer of this thread."""
        if not hasattr(self._own, "staging"):
            self._own.staging = host_bytes(CHUNK, pinned=self.device.type == "cuda")
        staging: Tensor = self._own.staging
        return staging

    def _chunks(
        self, flat: Tensor, block: Block[BinaryIO]
    ) -> Iterator[tuple[Tensor, Tensor, memoryview, int]]:
        """Of each chunk of a block: what of the tensor and of the staging buffer it is, the bytes
        of the file, up to a whole sector, and where these are."""
        for start in range(0, block.size, CHUNK):
            part = flat[start : start + CHUNK]
            length = -(-part.nbytes // ALIGNMENT) * ALIGNMENT
            whole = raw(self._staging[:length])
            yield part, self._staging[: part.nbytes], whole, block.start + start

    @contextlib.contextmanager
    def _on_stream(self, computed: torch.cuda.Event | None) -> Iterator[Callable[[], None]]:
        """Copy on a stream of this thread, behind what was `computed`; gives what waits for it."""
        if computed is None:
            yield lambda: None
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._own.stream.wait_event(computed)
        with torch.cuda.stream(self._own.stream):
            yield self._own.stream.synchronize

    def _write(
        self, flat: Tensor, block: Block[BinaryIO], computed: torch.cuda.Event | None
    ) -> None:
        number = block.slab.fileno()
        with self._on_stream(computed) as copied, self._naming("write"):
            for part, staging, left, place in self._chunks(flat, block):
                staging.copy_(part, non_blocking=True)
                copied()
                while left:
                    count = os.pwrite(number, left, place)
                    left, place = left[count:], place + count

    def _read(
        self,
        flat: Tensor,
        block: Block[BinaryIO],
        written: Future[None],
        computed: torch.cuda.Event | None,
    ) -> None:
        written.result()
        number = block.slab.fileno()
        with self._on_stream(computed) as copied, self._naming("read"):
            for part, staging, left, place in self._chunks(flat, block):
                while left:
                    count = os.preadv(number, [left], place)
                    if not count:
                        raise OSError("a file is shorter than what was written to it")
                    left, place = left[count:], place + count
                part.copy_(staging, non_blocking=True)
                copied()

    @contextlib.contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Raise what the system says as a `RunError` that names the folder."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"rank {self.rank} cannot {what} for offloaded values in `{self.path}`: "
                f"{error.strerror or error}",
                rank=self.rank,
                where=_room(self.path),
                help="name another folder after `path=`, or offload fewer layers",
            ) from error


def _done() -> Future[None]:
    found: Future[None] = Future()
    found.set_result(None)
    return found


def _room(path: Path) -> Iterator[str]:
    """How much room there is, if the system says so."""
    with contextlib.suppress(OSError):
        yield f"{size_text(shutil.disk_usage(path).free)} free there"


class DiskTensor:
    """A tensor in a file, once it is `written`."""

    def __init__(
        self, store: DiskStore, block: Block[BinaryIO], like: Tensor, written: Future[None]
    ) -> None:
        self.store, self.block, self.written = store, block, written
        self.shape, self.stride, self.dtype = like.shape, like.stride(), like.dtype

    def fetch(self) -> Moving:
        """Begin to bring it back to the device."""
        flat, done = self.store.fetch(self.block, self.written)
        back = flat.view(self.dtype).as_strided(self.shape, self.stride)
        return Moving(self, back, done)
