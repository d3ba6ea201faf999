"""Composites as functions of one rank's local tensors.

A binding is made once per node and rank: it works out what depends on the rank (the first row of a
split table, the global coordinates of random numbers) and returns a function of the node's tensor
operands, in the order of `Node.operands()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.kernels.hashing import Coords, RandomIndex
from meshwright.compiler.layout.factors import Dim, dim_axes
from meshwright.compiler.layout.layout import Layout, block_map
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.rows import Room
from meshwright.compiler.placing.composite import Composite, Kernel, composite_of


@dataclass(slots=True)
class RandomState:
    """The keys of a rank's random operators: the run's seed, and the number of the draw.

    An evaluation draws new numbers each time, and does not change those of the steps after it.
    """

    seed: int = 0
    step: int = 0
    evaluations: int = 0
    training: bool = True

    def begin(self, *, training: bool) -> None:
        """Turn to the next training step, or the next evaluation."""
        self.training = training
        if training:
            self.step += 1
        else:
            self.evaluations += 1

    @property
    def place(self) -> tuple[int, int, bool]:
        """Where it stands, for `restore`."""
        return self.step, self.evaluations, self.training

    def restore(self, place: tuple[int, int, bool]) -> None:
        """Go back to where it stood at `place`: what began since then did not happen."""
        self.step, self.evaluations, self.training = place

    @property
    def draw(self) -> int:
        """The number of the step, or another for each evaluation."""
        return self.step if self.training else self.step + (self.evaluations << 40)


@dataclass(slots=True)
class LossScale:
    """The factor of gradients in float16 while they are computed, the number of updates since it
    changed, and of those that were skipped."""

    value: float = 65536.0
    num_clean: int = 0
    num_skipped: int = 0


class Moving(Protocol):
    """A value on its way: `wait` gives it, a tensor or one that is `Away`, and lets go of the one
    that was moved."""

    def wait(self) -> Any: ...


class Away(Protocol):
    """A tensor in host memory or in a file: `fetch` begins to bring it back."""

    def fetch(self) -> Moving: ...


Store: TypeAlias = Callable[[Tensor], Moving]
"""Begins to bring a tensor to host memory, or to a file."""


def _no_store(path: str | None) -> Store:
    raise NotImplementedError


class FlatBuffer:
    """The memory of a bucket on one rank: `flat`, its `views`, one of each shape, and the
    `gradients` that parameters are given, which are equal to the views.

    While it is `released` the tensors of a buffer are empty, and code that is linked to `flat` and
    `views` has to `allocate` before it writes. Gradients that somebody keeps hold their memory,
    which `make` makes, given a number of elements, if it is not to be the device's.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.shapes, self.released, self._make = shapes, True, make
        self.flat, *self.views = (
            torch.empty(0, dtype=dtype, device=device) for _ in range(len(shapes) + 1)
        )
        self.gradients: list[Tensor] = []

    @property
    def home(self) -> FlatBuffer:
        """The buffer in which the gradients stay."""
        return self

    def leave(self) -> Moving:
        """Begin to bring the gradients to the buffer in which they stay, where that is another."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait until they are there."""

    def kept(self) -> Tensor:
        """A copy of the gradients, in memory like their own."""
        copy = self._new(self.flat.numel())
        copy.copy_(self.flat)
        return copy

    def _new(self, length: int) -> Tensor:
        return self.flat.new_empty(length) if self._make is None else self._make(length)

    def allocate(self) -> None:
        """Have memory, if there is none; what it holds is undefined."""
        if not self.released:
            return
        self.released = False
        sizes = [math.prod(shape) for shape in self.shapes]
        memory = self._new(sum(sizes))
        parts = zip(memory.split_with_sizes(sizes), self.shapes, strict=True)
        self.gradients = [part.view(shape) for part, shape in parts]
        for tensor, part in zip((self.flat, *self.views), (memory, *self.gradients), strict=True):
            tensor.data = part

    def release(self) -> None:
        """Let go of the memory."""
        self.released, self.gradients = True, []
        for tensor in (self.flat, *self.views):
            tensor.data = tensor.new_empty(0)


@dataclass(frozen=True, slots=True)
class RankContext:
    """What is linked into a rank's copy of the generated functions."""

    mesh: Mesh
    coords: Mapping[str, int]
    device: torch.device
    random: RandomState
    buckets: Mapping[str, FlatBuffer]
    """By bucket node."""
    scale: LossScale = field(default_factory=LossScale)
    first: bool = True
    """Whether this is the turn of a loop that the rank takes first."""
    stores: Callable[[str | None], Store] = _no_store
    """What moves tensors to host memory or, given a folder, to files there."""
    room: Room = field(default_factory=Room)
    """How many rows have come in exchanges of as many as there are."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A node to bind, on the rank with these coordinates."""

    node: Node
    mesh: Mesh
    coords: Mapping[str, int]
    random: RandomState
    device: torch.device
    scale: LossScale

    def operand(self, position: int) -> Node:
        """The node given as this argument."""
        found = self.node.args[position]
        assert isinstance(found, Node)
        return found

    def positions(self, dim: Dim) -> Tensor:
        """The global indices of the entries of `dim` held here."""
        return block_map(Layout((dim,)), self.mesh, self.coords)

    def start(self, dim: Dim) -> int:
        """The global index of the first of the consecutive entries of `dim` held here."""
        return int(self.positions(dim)[0]) if dim_axes(dim) else 0

    def coordinates(self, dims: tuple[Dim, ...]) -> tuple[Coords, ...]:
        """Where the local tensor lies along each dim, as `RandomIndex` wants it."""
        return tuple(self._coordinate(dim) for dim in dims)

    def _coordinate(self, dim: Dim) -> Coords:
        if not dim_axes(dim):
            return 0
        index = self.positions(dim)
        first = int(index[0])
        consecutive = torch.equal(index, torch.arange(first, first + len(index)))
        return first if consecutive else index

    def index(
        self, op_id: int, shape: Sequence[int], coords: tuple[Coords, ...]
    ) -> Callable[[], RandomIndex]:
        """The index of the numbers that this step draws for a global tensor of `shape`."""
        state, whole, device = self.random, tuple(shape), self.device
        here: list[tuple[Coords, ...]] = []

        def drawn() -> RandomIndex:
            if not here:  # copied to the device once, in the first step
                here.append(tuple(x if isinstance(x, int) else x.to(device) for x in coords))
            return RandomIndex(state.seed, state.draw, op_id, whole, here[0])

        return drawn


def bind(node: Node, context: RankContext) -> Kernel:
    """The function of its operands that runs a composite on one rank."""
    known, binding = _binding(node, context)
    kernel = known.bind(binding)
    taken = list(takewhile(lambda arg: arg is None or isinstance(arg, Node), node.args))
    if None not in taken:
        return kernel

    def filled(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return kernel(*(None if arg is None else next(given) for arg in taken))

    return filled


def bind_adding(node: Node, context: RankContext) -> Kernel:
    """The function of a total and its operands that adds a composite to the total on one rank."""
    known, binding = _binding(node, context)
    return known.bind_adding(binding)


def _binding(node: Node, context: RankContext) -> tuple[Composite, Binding]:
    known = composite_of(node.op)
    assert known is not None, node.op
    return known, Binding(
        node, context.mesh, context.coords, context.random, context.device, context.scale
    )
