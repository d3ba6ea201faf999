"""Tensors of one rank, as they look, and the memory behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeAlias

import torch

from meshwright.compiler.graph.ir import Node


class Use(StrEnum):
    """What memory is for, in the order of tables. `PARAMETERS` to `OPTIMIZER` outlive a step."""

    PARAMETERS = "parameters"
    BUFFERS = "buffers"
    CONSTANTS = "constants"
    """Tensors that the model holds without a name, and tables of random numbers."""
    BATCH = "batch"
    OPTIMIZER = "optimizer"
    GRADIENTS = "gradients"
    """Buckets, sums over microbatches, and what is on its way there."""
    COPIES = "copies of parameters"
    """Gathered, cast or otherwise computed of parameters alone."""
    ACTIVATIONS = "activations"
    """What a graph saves for a later one."""
    COMMUNICATION = "communication"
    """What exchanges under way have packed, or receive into."""
    VALUES = "values"
    """What one graph computes, and uses itself or returns."""
    TEMPORARIES = "temporaries"
    """What an operator holds while it runs, its result included."""


class Storage:
    """Memory that `held` values share, made by `node` for a `use`: the device's or, with another
    `place`, the host's or that of a file."""

    __slots__ = ("held", "node", "num_bytes", "place", "use")

    def __init__(
        self,
        num_bytes: int,
        node: Node | None = None,
        use: Use = Use.VALUES,
        place: str = "device",
    ) -> None:
        self.num_bytes, self.held, self.node = num_bytes, 0, node
        self.use, self.place = use, place


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


def fresh(shape: tuple[int, ...], dtype: torch.dtype, node: Node, use: Use) -> Local:
    """A tensor in memory of its own."""
    storage = Storage(math.prod(shape) * dtype.itemsize, node, use)
    return Local(shape, contiguous(shape), dtype, storage)


def moved(local: Local, node: Node, use: Use, place: str) -> Local:
    """A copy of a tensor elsewhere: of all the memory from its first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride, strict=True))
    length = last + 1 if math.prod(local.shape) else 0
    return replace(local, storage=Storage(length * local.dtype.itemsize, node, use, place))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps, the last dim's entries side by side."""
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))
