"""Cutting rows into blocks that stay in cache, and knowing when only shapes are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Elements of one block. On a CPU a block and its scratch fit the second-level cache (measured:
# 64 Ki to 256 Ki elements are within 5% of each other); elsewhere launches cost the most.
CPU_BLOCK = 1 << 17
DEVICE_BLOCK = 1 << 24


def has_data(tensor: Tensor) -> bool:
    """Whether there are values to look at."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def shapes_only(tensor: Tensor) -> bool:
    """Whether a kernel can do no more than return the right shapes: `tensor` has no data, and is on
    a device that torch cannot even index for here."""
    return tensor.is_cuda and not has_data(tensor) and not torch.cuda.is_available()


def fake_mode() -> object:
    """The fake mode in force, if there is one: tensors made in it are of no use outside it."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


Block = TypeVar("Block")


def enough(blocks: Iterable[Block], tensor: Tensor) -> Iterator[Block]:
    """Every block or, without data, two: all the memory that a run needs inside is then there."""
    most = None if has_data(tensor) else 2
    return islice(blocks, 0 if shapes_only(tensor) else most)


def block_elements(device: torch.device) -> int:
    """The number of elements that one block should have on `device`."""
    return CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


_traced: ContextVar[bool] = ContextVar("whether kernels are traced to be compiled", default=False)


@contextmanager
def in_one_block() -> Iterator[None]:
    """While this is open, `row_blocks` gives all rows at once: kernels are traced without data, and
    what compiles them cuts blocks of its own."""
    before = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(before)


def row_blocks(table: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of `table[rows, width]`, a block each."""
    rows, width = table.shape
    if _traced.get():
        yield slice(0, rows)
        return
    step = max(1, block_elements(table.device) // max(1, width))
    for start in enough(range(0, rows, step), table):
        yield slice(start, min(start + step, rows))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over values of `dtype` are taken: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32
