"""Host memory as a place for tensors: for a GPU's it is pinned, and has streams of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from meshwright.runtime.offloading.memory import bytes_of, flat_of, held, host_bytes
from meshwright.runtime.offloading.slabs import Block, Slabs


class Moving:
    """A copy that is under way, of the tensor `source`, which it keeps until `wait`."""

    def __init__(self, source: Any, result: Any, done: torch.cuda.Event | None) -> None:
        self.source, self.result, self.done = source, result, done
        self.copied = done

    def wait(self) -> Any:
        """The result, for whatever the device computes from here on."""
        if self.done is not None:
            torch.cuda.current_stream(self.done.device).wait_event(self.done)
            self.done = None
        self.source = None
        return self.result

    def settle(self) -> None:
        """Wait until the host may read the result."""
        if self.copied is not None:
            self.copied.synchronize()

    def __del__(self) -> None:
        # Memory of a copy that nobody has waited for, in a step that failed, must not be used yet.
        if self.done is not None:
            self.done.synchronize()


class HostStore:
    """The tensors of one rank in host memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slabs = Slabs(partial(host_bytes, pinned=device.type == "cuda"))
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._held: WeakValueDictionary[int, Any] = WeakValueDictionary()
        """The memory of tensors that stay, by address."""

    def __call__(self, tensor: Tensor) -> Moving:
        """Begin to bring a tensor to host memory."""
        flat = flat_of(tensor)
        block = self.slabs.take(flat.nbytes)
        away = HostTensor(self, block, tensor)
        away.arrived = self.copy("out", flat, away.flat)
        return Moving(tensor, away, away.arrived)

    def __repr__(self) -> str:
        return f"<HostStore: {self.slabs}>"

    def hold(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in host memory, which is free again with its last view; of undefined values."""
        size = bytes_of(shape, dtype)
        if not size:
            return torch.empty(shape, dtype=dtype)
        block = self.slabs.take(size)
        memory: Any = (ctypes.c_ubyte * size).from_address(block.slab.data_ptr() + block.start)
        memory.block = block
        tensor = held(memory, shape, dtype)
        self._held[tensor.data_ptr()] = memory
        return tensor

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor stays here."""
        return tensor.untyped_storage().data_ptr() in self._held

    def bring(self, tensor: Tensor) -> Moving:
        """Begin to bring a tensor that stays here to the device as well."""
        flat = flat_of(tensor)
        back = torch.empty(flat.shape, dtype=tensor.dtype, device=self.device)
        done = self.copy("in", flat, back)
        return Moving(tensor, back.as_strided(tensor.shape, tensor.stride()), done)

    def carry(self, tensor: Tensor, home: Tensor) -> Moving:
        """Begin to bring a tensor of the device to one that is here."""
        return Moving(tensor, home, self.copy("out", tensor, home))

    def ahead(self, tensor: Tensor) -> None:
        """Begin to read a tensor that stays here, for the CPU, which has it already."""

    def wait(self, tensor: Tensor) -> None:
        """Wait until it is read."""

    def settle(self, tensor: Tensor) -> None:
        """Begin to write back what the CPU has changed of it: there is nothing behind it."""

    def copy(
        self, way: str, source: Tensor, target: Tensor, after: torch.cuda.Event | None = None
    ) -> torch.cuda.Event | None:
        """Copy on the stream of one way, behind what is computed so far and `after`."""
        if self.device.type != "cuda":
            target.copy_(source)
            return None
        computing = torch.cuda.current_stream(self.device)
        for each in ("out", "in"):
            if each not in self._streams:
                self._streams[each] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream = self._streams[way]
        stream.wait_stream(computing)
        if way == "out":
            # What came back from the same block may still be on its way.
            stream.wait_stream(self._streams["in"])
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        event: torch.cuda.Event = stream.record_event()
        return event


class HostTensor:
    """A tensor in host memory, once it has `arrived`."""

    def __init__(self, store: HostStore, block: Block[Tensor], like: Tensor) -> None:
        self.store, self.block = store, block
        self.shape, self.stride, self.dtype = like.shape, like.stride(), like.dtype
        self.arrived: torch.cuda.Event | None = None

    @property
    def flat(self) -> Tensor:
        """Its memory."""
        block = self.block
        return block.slab[block.start : block.start + block.size].view(self.dtype)

    def fetch(self) -> Moving:
        """Begin to bring it back to the device."""
        flat = self.flat
        back = torch.empty(flat.shape, dtype=self.dtype, device=self.store.device)
        done = self.store.copy("in", flat, back, self.arrived)
        return Moving(self, back.as_strided(self.shape, self.stride), done)
