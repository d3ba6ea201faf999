"""Tensors of one rank, as they look, and the memory behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch


class Storage:
    """Memory that `held` values share."""

    __slots__ = ("held", "num_bytes")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.held = num_bytes, 0


@dataclass(frozen=True, slots=True)
class Local:
    """A rank's tensor: what it looks like, and the memory behind it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage: Storage

    @property
    def key(self) -> tuple[Any, ...]:
        """All but the memory."""
        return (self.shape, self.stride, self.dtype)


Held: TypeAlias = "Local | tuple[Any, ...] | None"
"""What a variable holds: one tensor, multiple, or none."""


def leaves(held: Any) -> Iterator[Local]:
    """The tensors that a variable holds."""
    if isinstance(held, Local):
        yield held
    elif isinstance(held, tuple):
        for item in held:
            yield from leaves(item)


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Local:
    """A tensor in memory of its own."""
    return Local(shape, contiguous(shape), dtype, Storage(math.prod(shape) * dtype.itemsize))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps, the last dim's entries side by side."""
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))
