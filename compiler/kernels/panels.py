"""Products of panels: the local steps of a product of matrices that ranks hold in blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meshwright.compiler.kernels import products

Matrices = tuple[Tensor, Tensor]


def factors(a: Tensor, b: Tensor, form: str) -> Matrices:
    """The two matrices whose product a form means: of `nn`, `a[..., k]` and `b[k, n]`; of `nt`,
    `a[..., k]` and `b[n, k]`; of `tn`, `a[..., m]` and `b[..., n]`, summed over all leading dims.
    """
    rows = a.reshape(-1, a.shape[-1])
    if form == "nn":
        return rows, b
    return (rows, b.t()) if form == "nt" else (rows.t(), b.reshape(-1, b.shape[-1]))


def product(a: Tensor, b: Tensor, *, form: str, large: bool) -> Tensor:
    """`[..., n]`, or `[m, n]` where leading dims are summed over."""
    if form == "tn":
        return (products.mm if large else torch.mm)(*factors(a, b, form))
    matrix = b if form == "nn" else b.t()
    return products.matmul(a, matrix) if large else torch.matmul(a, matrix)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, form: str, large: bool) -> Tensor:
    """`total`, with the product added to it in place."""
    flat = total.view(-1, total.shape[-1])
    add: Callable[..., Tensor] = products.add_mm if large else torch.Tensor.addmm_
    add(flat, *factors(a, b, form))
    return total


def put_block(total: Tensor, block: Tensor, dim: int, place: int) -> Tensor:
    """`total`, with the block written over its `place`-th part along `dim`."""
    size = block.shape[dim]
    total.narrow(dim, place * size, size).copy_(block)
    return total
