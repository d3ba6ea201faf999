"""The memory behind a tensor as one flat tensor, which is what moves: strides stay as they are."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def flat_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor from its first element to its last, in one dim; not a copy."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    length = last + 1 if math.prod(tensor.shape) else 0
    return tensor.as_strided((length,), (1,))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of bytes in host memory, for the system to read and write."""
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


def held(buffer: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in the memory of a buffer, which lives as long as that memory has a view."""
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(tuple(shape))


def bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def host_bytes(num_bytes: int, *, pinned: bool) -> Tensor:
    """New host memory, page by page; `pinned` for copies that a GPU makes by itself."""
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
