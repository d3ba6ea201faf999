"""Dropout whose mask is a hash of the global element index: the same numbers under every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from meshwright.compiler.kernels.blocks import accumulation_dtype, shapes_only
from meshwright.compiler.kernels.hashing import (
    WORD,
    RandomIndex,
    Tables,
    blocks,
    keys_of,
    tables_of,
    write_hashes,
)


def dropout(x: Tensor, p: float, index: RandomIndex) -> Tensor:
    """`x` with elements zeroed with probability `p`, the others divided by `1 - p`.

    Linear in `x`: the backward is the same call on the gradient.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if shapes_only(x):
        return out
    if p >= 1:
        return out.zero_()
    if p <= 0:
        return out.copy_(x)
    tables = tables_of(index, x.shape, x.device)
    rows, flat = x.reshape(tables.grid), out.view(tables.grid)
    for block, kept in _kept(tables, index, p, accumulation_dtype(x.dtype), x.device):
        torch.mul(rows[block], kept, out=flat[block])
    return out


def keep_scale(
    shape: Sequence[int], p: float, index: RandomIndex, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What `dropout` multiplies a local tensor of `shape` by: 0 or `1 / (1 - p)`, for 0 < p < 1."""
    tables = tables_of(index, tuple(shape), device)
    out = torch.empty(tables.grid, dtype=dtype, device=device)
    for block, kept in _kept(tables, index, p, dtype, device):
        out[block] = kept
    return out.view(tuple(shape))


def _kept(
    tables: Tables, index: RandomIndex, p: float, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows with their multipliers, in a buffer that the next block overwrites."""
    keys = keys_of(index)
    threshold = min(round(p * WORD), WORD - 1) - WORD // 2
    bits: Tensor | None = None
    for block in blocks(tables, device):
        if bits is None:
            size = (block.stop, tables.grid[1])
            bits = torch.empty(size, dtype=torch.int32, device=device)
            scratch = torch.empty_like(bits)
            kept = torch.empty(size, dtype=dtype, device=device)
        here = slice(0, block.stop - block.start)
        write_hashes(tables, block, keys, bits[here], scratch[here])
        yield block, kept[here].copy_(bits[here].ge_(threshold)).mul_(1 / (1 - p))
