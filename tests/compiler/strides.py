"""The same tensor under every kind of strides that slicing, permuting and expanding leave."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor


def strided(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`x` under other strides; the same values."""
    for order in permutations(range(x.dim())):
        back = [order.index(dim) for dim in range(x.dim())]
        yield f"permuted {order}", x.permute(order).contiguous().permute(back)
    for dim in range(x.dim()):
        wide = x.repeat_interleave(2, dim)
        yield f"every other of dim {dim}", wide[(slice(None),) * dim + (slice(None, None, 2),)]
        padded = torch.cat([x.new_zeros(()).expand_as(x), x, x], dim)
        yield f"from inside dim {dim}", padded.narrow(dim, x.shape[dim], x.shape[dim])
    if x.dim() > 1:
        wide = x.transpose(0, -1).repeat_interleave(2, 0)[::2]
        yield "transposed and every other", wide.transpose(0, -1)


def expanded(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The first entries of each dim, expanded; other values, so compared with a copy."""
    for dim in range(x.dim()):
        yield f"expanded dim {dim}", x.narrow(dim, 0, min(1, x.shape[dim])).expand_as(x)
