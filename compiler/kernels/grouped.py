"""Products of rows with matrices, one per group: each row meets the matrix of its group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from meshwright.compiler.kernels import products
from meshwright.compiler.kernels.blocks import has_data


def grouped_mm(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """`y[r, t] = x[r, t] @ weight[group[r, t]]`: `x[r, t, k]`, `weight[e, k, n]`, `y[r, t, n]`.

    Each row of an `x[r, k]` stands for t of them. Groups from e on have no matrix, and give zeros.
    The rows of a group are one product, whatever their order. Of `x[g, q, m, k]` and
    `group[g, q, m]`, rows of each block q meet `weight[q, e, k, n]`.
    """
    if weight.dim() == 4:
        flat = grouped_mm(x.flatten(0, 2), weight.flatten(0, 1), _in_all(group, weight.shape[1]))
        return flat.view(*group.shape, weight.shape[-1])
    order, ends = _ordered(group, weight.shape[0])
    rows = _taken(x, order, group)
    if _is_fused(rows, weight):
        outside = group.reshape(-1).index_select(0, order).ge(weight.shape[0]).unsqueeze(1)
        y = torch._grouped_mm(rows, weight, offs=ends).masked_fill_(outside, 0)
    else:
        y = rows.new_zeros(rows.shape[0], weight.shape[2])
        for e, start, stop in _groups(ends):
            _multiply(rows[start:stop], weight[e], y[start:stop])
    return torch.empty_like(y).index_copy_(0, order, y).view(*group.shape, weight.shape[2])


def grouped_mm_weight(x: Tensor, grad: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """The sum of `x[r, t]^T grad[r, t]` over the rows of each group, `[e, k, n]`; in blocks,
    `[q, e, k, n]`."""
    if x.dim() == 4:
        blocks, rows = x.shape[1], _in_all(group, num_groups)
        given = x.flatten(0, 2), grad.flatten(0, 2).unsqueeze(1)
        weight = grouped_mm_weight(*given, rows, blocks * num_groups)
        return weight.view(blocks, num_groups, *weight.shape[1:])
    order, ends = _ordered(group, num_groups)
    rows = _taken(x, order, group)
    grads = _taken(grad, order, group)
    if _is_fused(rows, grads):
        return torch._grouped_mm(rows.t(), grads, offs=ends)
    weight = grads.new_zeros(num_groups, rows.shape[1], grads.shape[1])
    for e, start, stop in _groups(ends):
        _multiply(rows[start:stop].t(), grads[start:stop], weight[e])
    return weight


def _in_all(group: Tensor, num_groups: int) -> Tensor:
    """The numbers among the groups of all blocks, as a column, for those among one block's."""
    blocks = group.shape[1]
    first = torch.arange(0, blocks * num_groups, num_groups, device=group.device).unsqueeze(1)
    return (group + first).where(group < num_groups, blocks * num_groups).view(-1, 1)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the product of two matrices to `out`."""
    rows, inner = a.shape
    large = a.dtype == torch.float32 and products.is_large(rows, inner, b.shape[1])
    (products.mm if large and products.is_faster(a.device) else torch.mm)(a, b, out=out)


def _taken(x: Tensor, order: Tensor, group: Tensor) -> Tensor:
    """The rows of x at flat places of `group`."""
    if x.dim() == 2:
        return x.index_select(0, order // group.shape[1])
    return x.reshape(-1, x.shape[2]).index_select(0, order)


def _ordered(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The places of `group`, flat, in the order of the groups, and where each group ends."""
    ordered, order = torch.sort(group.reshape(-1), stable=True)
    groups = torch.arange(num_groups, device=group.device, dtype=group.dtype)
    return order, torch.searchsorted(ordered, groups, right=True, out_int32=True)


def _groups(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """Each group that has rows, with its first row and the one after its last."""
    if not has_data(ends):
        return
    start = 0
    for e, stop in enumerate(ends.tolist()):
        if start < stop:
            yield e, start, stop
        start = stop


def _is_fused(*tensors: Tensor) -> bool:
    """Whether one kernel runs all groups, without waiting for their sizes."""
    return all(
        t.is_cuda and t.dtype == torch.bfloat16 and t.shape[-1] % 8 == 0 and t.shape[-2] % 8 == 0
        for t in tensors
    )
