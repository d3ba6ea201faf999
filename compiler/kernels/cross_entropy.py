"""Cross entropy by rows, with the classes whole or split over ranks.

With the classes split, each rank calls `cross_entropy_stats` on its columns; the small statistics
of all ranks, stacked, go to `cross_entropy_combine`; `cross_entropy_backward` needs only the
log-sum-exp. Nothing the size of the logits is made but the gradient itself: rows go through scratch
that stays in cache. The vocabulary-parallel loss is Megatron-LM's (Shoeybi et al., 2019).

Throughout: `logits[rows, v_local]` are the columns from the global class `offset` on, columns at or
beyond `num_classes` are padding of any content, `target[rows]` are global class numbers, and rows
whose target is `ignore_index` have loss and gradient 0. `weight[num_classes]` is the whole vector
of class weights. Results by row are float32, or float64 for float64 logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.compiler.kernels.blocks import accumulation_dtype, has_data, row_blocks, shapes_only


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(loss[rows], lse[rows])` where every class is here, unreduced."""
    kind = accumulation_dtype(logits.dtype)
    loss, lse = torch.empty(2, logits.shape[0], dtype=kind, device=logits.device)
    weights = None if weight is None else weight.to(kind)
    columns = logits.narrow(1, 0, num_classes)
    scratch: Tensor | None = None
    for block in row_blocks(columns):
        rows = columns[block].to(kind)
        scratch = log_softmax = _log_softmax(rows, scratch)
        picked = F.nll_loss(
            log_softmax, target[block], weights, ignore_index=ignore_index, reduction="none"
        )
        torch.sub(rows.amax(1), log_softmax.amax(1), out=lse[block])
        if label_smoothing:
            spread = log_softmax.sum(1) if weights is None else log_softmax @ weights
            spread.masked_fill_(target[block] == ignore_index, 0)
            picked.mul_(1 - label_smoothing).sub_(spread, alpha=label_smoothing / num_classes)
        loss[block] = picked
    return loss, lse


def cross_entropy_stats(
    logits: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    offset: int = 0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """What the loss needs of these columns: `stats[k, rows]`, k = 2, or 3 with label smoothing.

    They are the log-sum-exp of the columns, the target's logit where it is here (else 0), and the
    (weighted) sum of the logits. A target that is not a class is an `IndexError` on a CPU.
    """
    kind = accumulation_dtype(logits.dtype)
    num_stats = 3 if label_smoothing else 2
    stats = torch.empty(num_stats, logits.shape[0], dtype=kind, device=logits.device)
    if shapes_only(logits):
        return stats
    _check_targets(target, num_classes, ignore_index)
    valid = _valid_columns(logits, offset, num_classes)
    if not valid:
        stats.zero_()[0].fill_(-torch.inf)
        return stats
    columns = logits.narrow(1, 0, valid)
    _log_sum_exp(columns, out=stats[0])
    column, elsewhere = _column(target, offset, valid)
    picked = columns.gather(1, column.unsqueeze(1)).squeeze(1)
    stats[1] = picked.masked_fill_(elsewhere, 0)
    if label_smoothing:
        stats[2] = _weighted_sum(columns, weight, offset, kind)
    return stats


def cross_entropy_combine(
    stats: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(loss[rows], lse[rows])` from the statistics `stats[n, k, rows]` of all n ranks."""
    lses, picked, *sums = stats.unbind(1)
    lse = lses.logsumexp(0)
    loss = lse - picked.sum(0)
    if weight is not None:
        loss *= _row_weights(target, weight, ignore_index, loss.dtype)
    if label_smoothing:
        total = num_classes if weight is None else weight.sum(dtype=loss.dtype)
        spread = (lse * total).sub_(sums[0].sum(0))
        loss = loss.mul_(1 - label_smoothing).add_(spread, alpha=label_smoothing / num_classes)
    return loss.masked_fill_(target == ignore_index, 0), lse


def cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    grad_rows: Tensor,
    *,
    num_classes: int,
    offset: int = 0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of these columns, `[rows, v_local]`, from `grad_rows[rows]`, that of each loss.

    `lse[rows]` is over all ranks' columns. `out`, the only buffer of the size of the logits, may be
    the logits themselves. Padding columns get 0.
    """
    grad = out
    if grad is None:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if shapes_only(logits):
        return grad
    valid = _valid_columns(logits, offset, num_classes)
    grad.narrow(1, valid, logits.shape[1] - valid).zero_()
    if not valid:
        return grad
    rows = grad_rows.to(lse.dtype).masked_fill(target == ignore_index, 0)
    hit = rows * (1 - label_smoothing) if label_smoothing else rows
    if weight is not None:
        hit = hit * _row_weights(target, weight, ignore_index, hit.dtype)
    column, elsewhere = _column(target, offset, valid)
    smooth = _smoothing_terms(rows, weight, num_classes, label_smoothing, offset, valid)
    scale = hit if smooth is None else hit + smooth[0]
    _softmax_gradient(
        logits.narrow(1, 0, valid),
        grad.narrow(1, 0, valid),
        lse=None if valid == num_classes else lse.unsqueeze(1),
        scale=scale.unsqueeze(1),
        hit=hit.masked_fill(elsewhere, 0).neg_().unsqueeze(1),
        target=column.unsqueeze(1),
        spread=None if smooth is None else smooth[1],
    )
    return grad


def _row_weights(target: Tensor, weight: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The class weight of each row's target, 0 if that is ignored."""
    ignored = target == ignore_index
    chosen = weight.to(dtype).index_select(0, target.masked_fill(ignored, 0))
    return chosen.masked_fill_(ignored, 0)


def _log_sum_exp(columns: Tensor, *, out: Tensor) -> None:
    """Write the log-sum-exp of each row of `columns[rows, v]` to `out[rows]`, of the stats' type.

    torch's own takes four passes over a buffer of that size; `log_softmax` is one pass, and
    `max(z) - max(log_softmax(z))` is the log-sum-exp.
    """
    scratch: Tensor | None = None
    for block in row_blocks(columns):
        logits = columns[block].to(out.dtype)
        scratch = _log_softmax(logits, scratch)
        largest = logits.amax(1)
        lse = largest - scratch.amax(1)
        out[block] = lse.masked_fill_(largest == -torch.inf, -torch.inf)


def _log_softmax(rows: Tensor, scratch: Tensor | None) -> Tensor:
    """In `scratch` if it fits: a fresh buffer for every block would cost as much as the result."""
    if scratch is None or scratch.shape != rows.shape:
        scratch = torch.empty_like(rows, memory_format=torch.contiguous_format)
    torch.ops.aten._log_softmax.out(rows, 1, False, out=scratch)
    return scratch


def _softmax_gradient(
    logits: Tensor,
    grad: Tensor,
    *,
    lse: Tensor | None,
    scale: Tensor,
    hit: Tensor,
    target: Tensor,
    spread: tuple[Tensor, Tensor | None] | None,
) -> None:
    """Write `softmax * scale + hit at target - spread`, by blocks of rows, to `grad`.

    With `lse` None the softmax is over the given columns (one pass instead of two).
    """
    direct = grad.dtype == scale.dtype and grad.is_contiguous()
    for block in row_blocks(logits):
        rows = logits[block].to(scale.dtype)
        # Torch's softmax writes as if its result lay row by row, and does not check.
        into = (
            grad[block] if direct else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        )
        if lse is None:
            torch.ops.aten._softmax.out(rows, 1, False, out=into)
        else:
            torch.sub(rows, lse[block], out=into).exp_()
        into.mul_(scale[block])
        if spread is not None:
            _subtract_outer(into, spread[0][block], spread[1])
        into.scatter_add_(1, target[block], hit[block])
        if not direct:
            grad[block] = into


def _subtract_outer(into: Tensor, rows: Tensor, columns: Tensor | None) -> None:
    if columns is None:
        into.sub_(rows)
    else:
        into.addcmul_(rows, columns, value=-1)


def _smoothing_terms(
    rows: Tensor,
    weight: Tensor | None,
    num_classes: int,
    label_smoothing: float,
    offset: int,
    valid: int,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]] | None:
    """What smoothing adds to a row's scale, and the outer product that it takes from the row."""
    if not label_smoothing:
        return None
    share = rows * (label_smoothing / num_classes)
    if weight is None:
        return share * num_classes, (share.unsqueeze(1), None)
    weights = weight.to(rows.dtype)
    columns = weights.narrow(0, offset, valid).unsqueeze(0)
    return share * weights.sum(), (share.unsqueeze(1), columns)


def _weighted_sum(
    columns: Tensor, weight: Tensor | None, offset: int, dtype: torch.dtype
) -> Tensor:
    """The sum of each row, each column times its class weight if there are any."""
    if weight is None:
        return columns.sum(1, dtype=dtype)
    weights = weight.to(dtype).narrow(0, offset, columns.shape[1])
    total = torch.empty(columns.shape[0], dtype=dtype, device=columns.device)
    for block in row_blocks(columns):
        total[block] = columns[block].to(dtype) @ weights
    return total


def _valid_columns(logits: Tensor, offset: int, num_classes: int) -> int:
    """How many of these columns are classes; the rest are padding."""
    return max(0, min(logits.shape[1], num_classes - offset))


def _column(target: Tensor, offset: int, valid: int) -> tuple[Tensor, Tensor]:
    """Each target as a column here (any if elsewhere), and whether it is elsewhere."""
    local = target - offset if offset else target
    column = local.clamp(0, valid - 1)
    return column, column != local


def _check_targets(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse a target that is not a class; only on a CPU, since looking waits for other devices."""
    if target.device.type != "cpu" or not has_data(target):
        return
    wrong = (target < 0).logical_or_(target >= num_classes).logical_and_(target != ignore_index)
    if wrong.any():
        found = int(target[wrong][0])
        raise IndexError(f"target {found} is not one of {num_classes} classes")
