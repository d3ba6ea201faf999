"""Round float32 to bfloat16 up or down at random, so that the mean is the number itself.

Sixteen random bits are added to the sixteen that bfloat16 drops: the carry into the bits that stay
comes as often as what is dropped is large. The bits are a hash of the global element index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.compiler.kernels.blocks import shapes_only
from meshwright.compiler.kernels.hashing import (
    RandomIndex,
    blocks,
    keys_of,
    tables_of,
    write_hashes,
)

_DROPPED = (1 << 16) - 1


def round_stochastically(x: Tensor, index: RandomIndex, out: Tensor) -> None:
    """Write `x`, contiguous float32, to `out`, contiguous bfloat16 of the same shape.

    What bfloat16 has stays as it is, infinities and NaNs included. Source: stochastic rounding as
    in Gupta et al., 2015.
    """
    if shapes_only(x):
        return
    tables = tables_of(index, tuple(x.shape), x.device)
    rows, rounded, keys = x.view(tables.grid), out.view(tables.grid), keys_of(index)
    for block in blocks(tables, x.device):
        bits = torch.empty_like(rows[block], dtype=torch.int32)
        write_hashes(tables, block, keys, bits, torch.empty_like(bits))
        bits.bitwise_right_shift_(16).bitwise_and_(_DROPPED)
        bits.add_(rows[block].view(torch.int32)).bitwise_and_(~_DROPPED)
        nearest = rows[block].isnan()
        rounded[block] = torch.where(nearest, rows[block], bits.view(torch.float32))
