"""Embedding lookup in a table whose rows may be split over ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(weight: Tensor, index: Tensor, *, num_rows: int, offset: int = -1) -> Tensor:
    """The rows of `weight[v_local, d]` that `index[...]` names: `[..., d]`.

    `offset` is the global number of the first row held here; rows held elsewhere read as zeros, so
    that the sum over ranks is the lookup. A negative `offset` means that every row is here. The
    table has `num_rows` in all, padding left out; an index outside of it is an error.
    """
    if offset < 0:
        return F.embedding(index, weight)
    _check_index(index, num_rows)
    local = index - offset
    row = local.clamp(0, weight.shape[0] - 1)
    elsewhere = row.ne(local).unsqueeze(-1)
    return F.embedding(row, weight).masked_fill_(elsewhere, 0)


def _check_index(index: Tensor, num_rows: int) -> None:
    """Refuse an index that no rank has, without waiting for a device."""
    if index.numel():
        low, high = torch.aminmax(index)
        message = f"index out of range: the table has {num_rows} rows"
        torch.ops.aten._assert_async.msg((low >= 0).logical_and_(high < num_rows), message)


def embedding_backward(
    grad: Tensor,
    index: Tensor,
    *,
    num_rows: int,
    offset: int = -1,
    padding_idx: int = -1,
) -> Tensor:
    """The gradient `[num_rows, d]` of the `num_rows` rows held here, from `grad[..., d]`.

    `offset` is as in `embedding`. The row `padding_idx` (global; negative means none) gets no
    gradient.
    """
    local, skipped = _rows_here(index, num_rows, offset, padding_idx)
    result: Tensor = torch.ops.aten.embedding_dense_backward(grad, local, num_rows, skipped, False)
    return result


def add_embedding_backward(
    total: Tensor, grad: Tensor, index: Tensor, *, offset: int = -1, padding_idx: int = -1
) -> Tensor:
    """`total[num_rows, d]`, with what `embedding_backward` gives added in place: of a large table
    a batch reads few rows, and a gradient of its own would be mostly zeros.
    """
    local, skipped = _rows_here(index, total.shape[0], offset, padding_idx)
    if skipped >= 0:
        away = local == skipped
        local, grad = local.masked_fill(away, 0), grad.masked_fill(away.unsqueeze(-1), 0)
    rows, values = local.reshape(-1), grad.reshape(-1, grad.shape[-1])
    if total.device.type == "cpu":
        return total.index_add_(0, rows, values)
    # The other adds up in no fixed order there.
    return total.index_put_((rows,), values, accumulate=True)


def _rows_here(index: Tensor, num_rows: int, offset: int, padding_idx: int) -> tuple[Tensor, int]:
    """Local row numbers, and the one number among them that gets no gradient (-1: none does).

    Rows held elsewhere and the padding row share the number `num_rows`, just past the table: the
    backward kernel compares with the skipped number before it touches the table.
    """
    if offset < 0:
        return index, padding_idx
    local = index - offset
    away = (local < 0).logical_or_(local >= num_rows)
    if padding_idx >= 0:
        away.logical_or_(index == padding_idx)
    return local.masked_fill_(away, num_rows), num_rows
