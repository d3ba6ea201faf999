"""Cross entropy against class probabilities, by rows, with the classes whole or split over ranks.

The shapes and names are those of `cross_entropy`, but `target[rows, v_local]` holds probabilities.
The target gets no gradient here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.compiler.kernels.blocks import accumulation_dtype, row_blocks, shapes_only
from meshwright.compiler.kernels.cross_entropy import log_sum_exp


def soft_cross_entropy_stats(
    logits: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    offset: int = 0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """`stats[3, rows]`: log-sum-exp, sum of share times logit, and sum of the shares.

    A share is the smoothed probability of a class, times its class weight.
    """
    kind = accumulation_dtype(logits.dtype)
    stats = torch.zeros(3, logits.shape[0], dtype=kind, device=logits.device)
    if shapes_only(logits):
        return stats
    valid = max(0, min(logits.shape[1], num_classes - offset))
    if not valid:
        stats[0] = -torch.inf
        return stats
    columns = logits.narrow(1, 0, valid)
    log_sum_exp(columns, out=stats[0])
    for block in row_blocks(columns):
        shares = _shares(
            target[block, :valid].to(kind), num_classes, offset, label_smoothing, weight
        )
        stats[2, block] = shares.sum(1)
        stats[1, block] = shares.mul_(columns[block]).sum(1)
    return stats


def soft_cross_entropy_combine(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss[rows], lse[rows], total[rows])` from the `stats[n, 3, rows]` of all n ranks.

    `total` is the sum of the shares over all classes.
    """
    lses, products, shares = stats.unbind(1)
    lse, total = lses.logsumexp(0), shares.sum(0)
    return (lse * total).sub_(products.sum(0)), lse, total


def soft_cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    total: Tensor,
    grad_rows: Tensor,
    *,
    num_classes: int,
    offset: int = 0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """The gradient of these columns of the logits, `[rows, v_local]`."""
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    valid = max(0, min(logits.shape[1], num_classes - offset))
    if shapes_only(logits) or not valid:
        return grad
    for block in row_blocks(logits):
        softmax = (logits[block, :valid].to(lse.dtype) - lse[block].unsqueeze(1)).exp_()
        probabilities = target[block, :valid].to(lse.dtype)
        shares = _shares(probabilities, num_classes, offset, label_smoothing, weight)
        softmax.mul_(total[block].unsqueeze(1)).sub_(shares)
        grad[block, :valid] = softmax.mul_(grad_rows[block].to(lse.dtype).unsqueeze(1))
    return grad


def _shares(
    probabilities: Tensor,
    num_classes: int,
    offset: int,
    label_smoothing: float,
    weight: Tensor | None,
) -> Tensor:
    """The smoothed, weighted probabilities, in a buffer of their own."""
    shares = probabilities * (1 - label_smoothing)
    if label_smoothing:
        shares += label_smoothing / num_classes
    if weight is not None:
        shares *= weight.to(shares.dtype).narrow(0, offset, shares.shape[1])
    return shares
