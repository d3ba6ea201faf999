"""The hash of a global element index that every random number is made of.

An element's 32 bits are a two-round 32-bit integer hash (the multipliers and shifts are Wellons'
`lowbias32`) of its number within the global tensor, keyed by (seed, step, operator): the same under
every layout. All of it is int32 arithmetic that wraps around; the high bits are the good ones. A
tensor of more than 2**32 elements has a second word for its outer dims, which changes both keys.

The number of an element is a sum over dims, and multiplication by an odd constant distributes over
it, so the first multiplication is done in small tables for the rows and the columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from meshwright.compiler.kernels.blocks import DEVICE_BLOCK, enough, fake_mode

# Two int32 buffers and one of floats, of this many elements, stay in the second-level cache.
_CPU_BLOCK = 1 << 16
WORD = 1 << 32
_SPREAD = 0x9E3779B1
_FIRST = 0x21F0AAAD
_SECOND = 0x735A2D97

Coords = Tensor | int


@dataclass(frozen=True)
class RandomIndex:
    """Which random numbers an operator draws, and where its local tensor lies in the global one.

    `shape` is the global shape. `coords` has, for every dim, the global coordinates of the local
    positions: a 1-D integer tensor, or the first of consecutive ones as an int.
    """

    seed: int
    step: int
    op_id: int
    shape: tuple[int, ...]
    coords: tuple[Coords, ...]

    def narrow(self, dim: int, start: int, length: int) -> RandomIndex:
        """The same numbers, for local positions `start` to `start + length` of `dim`."""
        here = self.coords[dim]
        inner = here + start if isinstance(here, int) else here.narrow(0, start, length)
        return replace(self, coords=(*self.coords[:dim], inner, *self.coords[dim + 1 :]))

    def lane(self, number: int) -> RandomIndex:
        """Other numbers of the same operator, for one that draws multiple per element."""
        return replace(self, op_id=self.op_id + (number << 32))


def keys_of(index: RandomIndex) -> tuple[int, int]:
    """The two 32-bit keys of the operator's numbers in this step."""
    return _keys(index.seed, index.step, index.op_id)


@dataclass(frozen=True)
class Tables:
    """Local positions as a grid of rows and columns, and what each adds to an element's number.

    `rows` and `columns` are int32, already multiplied; `outer` is the second word of each row, as
    int64, where the global tensor needs one.
    """

    grid: tuple[int, int]
    rows: Tensor
    columns: Tensor
    outer: Tensor | None


def blocks(tables: Tables, device: torch.device) -> Iterator[slice]:
    """Slices that cover the rows of a grid, a block each."""
    rows, width = tables.grid
    step = max(1, (_CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK) // max(1, width))
    for start in enough(range(0, rows, step), tables.rows):
        yield slice(start, min(start + step, rows))


def write_hashes(
    tables: Tables, block: slice, keys: tuple[int, int], bits: Tensor, scratch: Tensor
) -> None:
    """Write the hashes of a block of rows to `bits`; `scratch` has the same shape."""
    first: Tensor | int
    second: Tensor | int
    first, second = keys
    if tables.outer is not None:
        first, second = (
            _to_int32(_mix(tables.outer[block] * _SPREAD + key % WORD)).unsqueeze(1) for key in keys
        )
    torch.add(tables.rows[block].unsqueeze(1) + first, tables.columns, out=bits)
    _xor_shift(bits, 16, scratch)
    bits.mul_(_signed(_FIRST)).bitwise_xor_(second)
    _xor_shift(bits, 15, scratch)
    bits.mul_(_signed(_SECOND))


def _xor_shift(bits: Tensor, places: int, scratch: Tensor) -> None:
    """`bits ^= bits >>> places`; torch shifts int32 in copies of the sign, so those are masked."""
    torch.bitwise_right_shift(bits, places, out=scratch)
    bits.bitwise_xor_(scratch.bitwise_and_((1 << (32 - places)) - 1))


def tables_of(index: RandomIndex, shape: tuple[int, ...], device: torch.device) -> Tables:
    """The tables of a local tensor; kept where its positions are consecutive."""
    if any(isinstance(coords, Tensor) for coords in index.coords):
        return _make_tables(index.shape, index.coords, shape, device)
    return _cached_tables(index.shape, index.coords, shape, device, fake_mode())


@lru_cache(maxsize=256)
def _cached_tables(
    whole: tuple[int, ...],
    coords: tuple[Coords, ...],
    shape: tuple[int, ...],
    device: torch.device,
    mode: object,
) -> Tables:
    return _make_tables(whole, coords, shape, device)


def _make_tables(
    whole: tuple[int, ...],
    coords: tuple[Coords, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> Tables:
    if any(size > WORD for size in whole):
        raise ValueError(f"a random tensor's dims have at most 2**32 elements, not {max(whole)}")
    inner = _suffix(whole, WORD)
    cut = max(inner, min(_suffix(shape, _CPU_BLOCK), max(0, len(shape) - 1)))
    low, high = [torch.zeros((), dtype=torch.int64, device=device)] * 2, None
    for dim, (size, where) in enumerate(zip(shape, coords, strict=True)):
        positions = _positions(where, size, device)
        stop = len(whole) if dim >= inner else inner
        part = positions * prod(whole[dim + 1 : stop])
        if dim < inner:
            high = part if high is None else _outer_sum(high, part)
            part = torch.zeros_like(part)
        low[dim >= cut] = _outer_sum(low[dim >= cut], part)
    rows, columns = (_to_int32((part % WORD) * _SPREAD).reshape(-1) for part in low)
    outer = None if high is None else _spread_over(high, rows.numel())
    return Tables((rows.numel(), columns.numel()), rows, columns, outer)


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    return (left.reshape(-1, 1) + right).reshape(-1)


def _spread_over(outer: Tensor, rows: int) -> Tensor:
    """The second word of every row, from those of the leading dims alone."""
    return outer.repeat_interleave(rows // max(1, outer.numel()))


def _positions(where: Coords, size: int, device: torch.device) -> Tensor:
    if isinstance(where, int):
        return torch.arange(where, where + size, dtype=torch.int64, device=device)
    return where.to(device=device, dtype=torch.int64)


def _suffix(shape: tuple[int, ...], limit: int) -> int:
    """The first dim of the longest run of last dims with at most `limit` elements together."""
    total, first = 1, len(shape)
    while first and total * shape[first - 1] <= limit:
        first -= 1
        total *= shape[first]
    return first


def _to_int32(words: Tensor) -> Tensor:
    """The low 32 bits of int64 values, as int32."""
    return ((words + WORD // 2) % WORD - WORD // 2).to(torch.int32)


def _signed(word: int) -> int:
    """The int32 with the bits of a word."""
    return (word + WORD // 2) % WORD - WORD // 2


def _mix(words: Tensor) -> Tensor:
    """The full hash on int64 tables of 32-bit words."""
    words = words % WORD
    words = (words ^ (words >> 16)) * _FIRST % WORD
    words = (words ^ (words >> 15)) * _SECOND % WORD
    return words ^ (words >> 15)


@lru_cache(maxsize=1024)
def _keys(seed: int, step: int, op_id: int) -> tuple[int, int]:
    """Two 32-bit keys, by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mask = (1 << 64) - 1
    state = 0
    for word in (seed, step, op_id):
        state = (state + word * 2 + 1) * 0x9E3779B97F4A7C15 & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return _signed(state % WORD), _signed(state >> 32)
