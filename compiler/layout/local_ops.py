"""Operations on a rank's own tensor before and after a collective, as data for code generation.

Sizes are local and known when the program is compiled; only coordinates depend on the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TypeAlias

import torch
from torch import Tensor

from meshwright.compiler.layout.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Reshape:
    """`tensor.reshape(shape)`: a view wherever the strides allow one."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Permute:
    """`tensor.permute(order)`."""

    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Select:
    """`tensor.select(dim, i)`, i being this rank's place over `axes`, the first of them major."""

    dim: int
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """The inverse of `Select`: a new dim of zeros but for the tensor at this rank's place."""

    dim: int
    size: int
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Take:
    """`tensor.select(dim, 0)`, for a dim whose entries are all the same."""

    dim: int


@dataclass(frozen=True, slots=True)
class Spread:
    """`tensor.expand(size, *tensor.shape)`: the same for each rank of a new first dim."""

    size: int


@dataclass(frozen=True, slots=True)
class KeepFirst:
    """The tensor where the coordinates on `axes` are all 0, zeros elsewhere."""

    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BySegment:
    """Divide `dim` into lengths, run the operations of each, concatenate along `into`."""

    dim: int
    into: int
    segments: tuple[tuple[int, tuple[LocalOp, ...]], ...]


LocalOp: TypeAlias = "Reshape | Permute | Select | Place | Take | Spread | KeepFirst | BySegment"


def bound(op: LocalOp, coords: Mapping[str, int], mesh: Mesh) -> Callable[[Tensor], Tensor]:
    """One operation as a function of the tensor of the rank at `coords`."""
    match op:
        case Reshape(shape):
            return lambda tensor: tensor.reshape(shape)
        case Permute(order):
            return lambda tensor: tensor.permute(order)
        case Select(dim, axes):
            place = mesh.position(coords, axes)
            return lambda tensor: tensor.select(dim, place)
        case Take(dim):
            return lambda tensor: tensor.select(dim, 0)
        case Spread(size):
            return lambda tensor: tensor.expand(size, *tensor.shape)
        case KeepFirst(axes):
            return torch.zeros_like if mesh.position(coords, axes) else lambda tensor: tensor
        case Place(dim, size, axes):
            return partial(_padded, dim, size, mesh.position(coords, axes))
        case BySegment(dim, into, segments):
            lengths = [length for length, _ in segments]
            inner = [[bound(each, coords, mesh) for each in ops] for _, ops in segments]
            return partial(_by_segment, dim, into, lengths, inner)


def _padded(dim: int, size: int, place: int, tensor: Tensor) -> Tensor:
    padded = tensor.new_zeros((*tensor.shape[:dim], size, *tensor.shape[dim:]))
    padded.select(dim, place).copy_(tensor)
    return padded


def _by_segment(
    dim: int,
    into: int,
    lengths: list[int],
    inner: Sequence[Sequence[Callable[[Tensor], Tensor]]],
    tensor: Tensor,
) -> Tensor:
    given = torch.split_with_sizes(tensor, lengths, dim)
    done = [
        reduce(lambda value, step: step(value), steps, part)
        for part, steps in zip(given, inner, strict=True)
    ]
    return torch.cat(done, into)


def apply_all(
    ops: Iterable[LocalOp], tensor: Tensor, coords: Mapping[str, int], mesh: Mesh
) -> Tensor:
    """The tensor of the rank at `coords` after operations, in order."""
    for op in ops:
        tensor = bound(op, coords, mesh)(tensor)
    return tensor


def shape_after(ops: Iterable[LocalOp], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a rank's tensor after operations."""
    for op in ops:
        match op:
            case Reshape(new):
                shape = new
            case Permute(order):
                shape = tuple(shape[i] for i in order)
            case Select(dim, _) | Take(dim):
                shape = (*shape[:dim], *shape[dim + 1 :])
            case Place(dim, size, _):
                shape = (*shape[:dim], size, *shape[dim:])
            case Spread(size):
                shape = (size, *shape)
            case BySegment(dim, into, segments):
                shapes = [
                    shape_after(inner, (*shape[:dim], length, *shape[dim + 1 :]))
                    for length, inner in segments
                ]
                total = sum(each[into] for each in shapes)
                shape = (*shapes[0][:into], total, *shapes[0][into + 1 :])
            case KeepFirst():
                pass
    return shape
