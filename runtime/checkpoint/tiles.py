"""Tiles of a tensor: blocks with a digest each, so that a part can be read and checked by itself.

Each dim is cut into blocks of one size. Their number is one that meshes divide, so that what a rank
needs is made of whole tiles, for whatever dims it is split on.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from meshwright.runtime.checkpoint.files import bytes_of

_COUNTS = (1, 2, 4, 8, 24, 48)
"""How many blocks a dim may have; each divides the next."""
_LEAST, _MOST, _TARGET = 1 << 10, 1 << 16, 64
"""Bytes of a tile: a 64th of the tensor or more, but at least the first, at most the second."""
Ranges = list[tuple[int, int]]


class Tiles:
    """The tiles of a tensor of a shape, in the order of a row-major walk."""

    def __init__(self, shape: Sequence[int], itemsize: int) -> None:
        self.shape, self.itemsize = tuple(shape), itemsize
        num_bytes = math.prod(shape) * itemsize
        most = num_bytes // min(max(num_bytes // _TARGET, _LEAST), _MOST)
        places = [0] * len(self.shape)
        while (dim := self._next(places, most)) is not None:
            places[dim] += 1
        self.blocks = [
            max(1, -(-size // _COUNTS[place]))
            for size, place in zip(self.shape, places, strict=True)
        ]
        self.counts = [
            max(1, -(-size // block)) for size, block in zip(self.shape, self.blocks, strict=True)
        ]

    def _next(self, places: Sequence[int], most: int) -> int | None:
        """The dim to cut further: the first of those in the fewest blocks that still can be."""
        count = math.prod(_COUNTS[place] for place in places)
        for dim in sorted(range(len(places)), key=lambda dim: places[dim]):
            if places[dim] + 1 < len(_COUNTS):
                more = _COUNTS[places[dim] + 1]
                if more <= self.shape[dim] and count // _COUNTS[places[dim]] * more <= most:
                    return dim
        return None

    def __len__(self) -> int:
        return math.prod(self.counts)

    def digests(self, tensor: Tensor) -> list[str]:
        """The SHA-256 of every tile, in hex."""
        return [self.digest(tensor, place) for _, place in self.places(self.all)]

    def digest(self, tensor: Tensor, place: Sequence[int]) -> str:
        """The SHA-256 of the bytes of the tile at a place of the grid, row-major."""
        index = tuple(
            slice(i * block, (i + 1) * block) for i, block in zip(place, self.blocks, strict=True)
        )
        tile = tensor[index].contiguous()
        return hashlib.sha256(bytes_of(tile)).hexdigest()

    def touched(self, needed: Sequence[Tensor]) -> list[list[int]]:
        """By dim, the blocks in which any of the indices `needed` lies."""
        return [
            torch.bincount(index // block).nonzero().squeeze(1).tolist()
            for index, block in zip(needed, self.blocks, strict=True)
        ]

    @property
    def all(self) -> list[list[int]]:
        """By dim, every block."""
        return [list(range(count)) for count in self.counts]

    def places(self, touched: Sequence[Sequence[int]]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Number and place in the grid of the tiles of which all dims are touched."""
        for place in itertools.product(*touched):
            number = 0
            for i, count in zip(place, self.counts, strict=True):
                number = number * count + i
            yield number, place

    def runs(self, touched: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """First and last byte of each run that tiles take up, of those where all dims are touched.

        In the row-major tensor; neighbours are one run.
        """
        ranges = [
            _joined(blocks, block, size)
            for blocks, block, size in zip(touched, self.blocks, self.shape, strict=True)
        ]
        inner = len(ranges)
        while inner and ranges[inner - 1] == [(0, self.shape[inner - 1])]:
            inner -= 1
        strides = [
            math.prod(self.shape[dim + 1 :]) * self.itemsize for dim in range(len(self.shape))
        ]
        if not inner:
            yield 0, math.prod(self.shape) * self.itemsize
            return
        outer = [[i for a, b in each for i in range(a, b)] for each in ranges[: inner - 1]]
        stride = strides[inner - 1]
        for place in itertools.product(*outer):
            first = sum(i * step for i, step in zip(place, strides, strict=False))
            for begin, end in ranges[inner - 1]:
                yield first + begin * stride, first + end * stride


def _joined(blocks: Sequence[int], block: int, size: int) -> Ranges:
    """The ranges of indices that these blocks cover, neighbours together."""
    found: Ranges = []
    for i in blocks:
        begin, end = i * block, min((i + 1) * block, size)
        if found and found[-1][1] == begin:
            found[-1] = found[-1][0], end
        else:
            found.append((begin, end))
    return found
