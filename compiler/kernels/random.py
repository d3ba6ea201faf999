"""Random numbers that are hashes of the global element index: the same under every layout.

`random` gives the local part of a global tensor of independent numbers of one `kind`:

    uniform   strictly between 0 and 1, on the middles of equal steps, so that no logarithm is inf
    normal    of mean 0 and variance 1, by the inverse of the error function
    bits      int64, from 0 to 2**63 - 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meshwright.compiler.kernels.hashing import (
    RandomIndex,
    Tables,
    blocks,
    keys_of,
    tables_of,
    write_hashes,
)

_DIGITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
"""How many random bits a uniform number of each type has; one more digit is its middle."""
_INTEGER_PART = 21
"""Bits of an integer that one hash gives: its low bits are not good enough for a remainder."""


def random(
    shape: Sequence[int], kind: str, index: RandomIndex, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The numbers of the local `shape`; see above for the kinds."""
    exact = dtype if kind != "normal" or dtype.itemsize > 2 else torch.float32
    tables = tables_of(index, tuple(shape), device)
    out = torch.empty(tables.grid, dtype=exact, device=device)
    draw = _Draw(tables, index, device)
    for block in blocks(tables, device):
        if kind == "bits":
            draw.integers(block, out[block])
        else:
            draw.uniform(block, out[block])
        if kind == "normal":
            out[block].mul_(2).sub_(1).erfinv_().mul_(2**0.5)
    return out.view(tuple(shape)).to(dtype)


class _Draw:
    """Buffers for the hashes of one block at a time."""

    def __init__(self, tables: Tables, index: RandomIndex, device: torch.device) -> None:
        self.tables, self.keys = tables, [keys_of(index.lane(i)) for i in range(3)]
        first = next(blocks(tables, device), slice(0, 0))
        size = (first.stop, tables.grid[1])
        self.bits, self.scratch = torch.empty((2, *size), dtype=torch.int32, device=device)

    def hashes(self, block: slice, lane: int) -> Tensor:
        """The hashes of a block, in a buffer that the next ones overwrite."""
        here = slice(0, block.stop - block.start)
        write_hashes(self.tables, block, self.keys[lane], self.bits[here], self.scratch[here])
        found: Tensor = self.bits[here]
        return found

    def uniform(self, block: slice, out: Tensor) -> None:
        """Write numbers between 0 and 1; shifts keep the sign, so half of the steps is added."""
        digits = _DIGITS[out.dtype]
        if out.dtype == torch.float64:
            out.copy_(self.hashes(block, 0) >> 6).mul_(1 << 26).add_(self.hashes(block, 1) >> 6)
            out.add_((1 << 51) + (1 << 25) + 0.5).mul_(2.0**-digits)
            return
        wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        wide.copy_(self.hashes(block, 0).bitwise_right_shift_(32 - digits))
        wide.add_((1 << (digits - 1)) + 0.5).mul_(2.0**-digits)
        if wide is not out:
            out.copy_(wide)

    def integers(self, block: slice, out: Tensor) -> None:
        """Write 63 bits, the best of three hashes each."""
        out.zero_()
        for lane in range(3):
            part = self.hashes(block, lane).bitwise_right_shift_(32 - _INTEGER_PART)
            out.mul_(1 << _INTEGER_PART).add_(part.bitwise_and_((1 << _INTEGER_PART) - 1))
