"""Layer norm and RMS norm over the last dim, which may be split over ranks.

`x[..., n]` is given with its normalised dims flattened into n; every other dim is a row, and the
statistics `mean` and `rstd` have the shape `x.shape[:-1]`. RMS norm has no mean: it is None there.

With n split evenly, each rank takes `norm_stats` (or `rms_stats`) of its part; the statistics of
all ranks, stacked, go to `norm_combine` (`rms_combine`), and `norm_apply` finishes. In the
backward, `norm_backward_sums` are summed over the ranks and given to `norm_backward_apply`.
Statistics are then float32, or float64 for float64 inputs. Variances are combined as in Chan, Golub
and LeVeque (1979), so that a large mean costs no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.compiler.kernels.blocks import accumulation_dtype, row_blocks


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, mean, rstd)` where n is whole; the statistics have torch's own type."""
    y, mean, rstd = torch.ops.aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(dx, dweight, dbias)`; a parameter that is not there has no gradient."""
    # Of the bias, torch looks at no more than shape and type.
    bias = None if bias_dtype is None else x.new_empty(x.shape[-1:], dtype=bias_dtype)
    mask = [True, weight is not None, bias is not None]
    stats = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], *stats, weight, bias, mask
    )
    return dx, dweight if mask[1] else None, dbias if mask[2] else None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`(y, rstd)` where n is whole, as `F.rms_norm` with this `eps`."""
    if _has_kernel(x, weight):
        y, rstd = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
        return y, rstd.squeeze(-1)
    rstd = rms_combine(rms_stats(x).unsqueeze(0), x.shape[-1], eps)
    return norm_apply(x, None, rstd, weight, None), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`(dx, dweight)` where n is whole."""
    if _has_kernel(x, weight):
        mask = [True, weight is not None]
        dx, dweight = torch.ops.aten._fused_rms_norm_backward(
            grad, x, x.shape[-1:], rstd.unsqueeze(-1), weight, mask
        )
        return dx, dweight if mask[1] else None
    if x.dtype in (torch.float32, torch.float64):
        return _rms_by_layer_norm(grad, x, rstd, weight)
    sums = norm_backward_sums(grad, x, None, rstd, weight)
    dx, dweight, _ = norm_backward_apply(
        sums, grad, x, None, rstd, weight, n=x.shape[-1], bias_dtype=None
    )
    return dx, dweight


def _has_kernel(x: Tensor, weight: Tensor | None) -> bool:
    """Whether torch has a kernel for RMS norm: on GPUs, where all is of one type."""
    return x.is_cuda and (weight is None or weight.dtype == x.dtype)


def _rms_by_layer_norm(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The backward of RMS norm by layer norm's kernel, a third of the time of separate operators.

    With a mean of 0 the two differ only by layer norm's term for its mean, which is added back.
    """
    no_mean = torch.zeros_like(rstd)
    dx, dweight, _ = layer_norm_backward(grad, x, no_mean, rstd, weight, None)
    shift = grad.sum(-1) if weight is None else grad @ weight
    return dx.add_(shift.mul_(rstd).div_(x.shape[-1]).unsqueeze(-1)), dweight


def norm_stats(x: Tensor) -> Tensor:
    """`stats[2, ...]`: each row's mean, and its sum of squared differences from it."""
    stats = torch.empty(2, *x.shape[:-1], dtype=accumulation_dtype(x.dtype), device=x.device)
    rows, (mean, squares) = _rows(x), stats.view(2, -1)
    for block in row_blocks(rows):
        # torch.var_mean is one pass in a scalar loop, and ten times slower on a CPU.
        torch.mean(rows[block], 1, dtype=stats.dtype, out=mean[block])
        apart = rows[block] - mean[block].unsqueeze(1)
        squares[block] = torch.linalg.vector_norm(apart, dim=1).square_()
    return stats


def norm_combine(stats: Tensor, n_local: int, eps: float) -> tuple[Tensor, Tensor]:
    """`(mean, rstd)` from the `stats[ranks, 2, ...]` of parts of `n_local` elements each."""
    means, squares = stats.unbind(1)
    mean = means.mean(0)
    total = squares.sum(0).add_((means - mean).square_().sum(0), alpha=n_local)
    return mean, total.div_(n_local * stats.shape[0]).add_(eps).rsqrt_()


def rms_stats(x: Tensor) -> Tensor:
    """`stats[...]`: each row's sum of squares."""
    kind = accumulation_dtype(x.dtype)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=kind)
    return length.square_()


def rms_combine(stats: Tensor, n: int, eps: float) -> Tensor:
    """`rstd` from the `stats[ranks, ...]` of the parts of rows of `n` elements in all."""
    mean_square: Tensor = stats.sum(0).div_(n)
    return mean_square.add_(eps).rsqrt_()


def norm_apply(
    x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`(x - mean) * rstd * weight + bias`, in x's type, for the part of n that is here."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, flat = _rows(x), _rows(out)
    for block in row_blocks(rows):
        y = _normalised(rows, mean, rstd, block)
        if weight is not None:
            y.mul_(weight)
        if bias is not None:
            y.add_(bias)
        flat[block] = y
    return out


def norm_backward_sums(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None
) -> Tensor:
    """`sums[2, ...]` over the part of n that is here, of g and of g times the normalised x.

    g is `grad * weight`. For RMS norm the first is 0: the sum over ranks may then carry both.
    """
    kind = accumulation_dtype(x.dtype)
    sums = torch.zeros(2, rstd.numel(), dtype=kind, device=x.device)
    grads, rows = _rows(grad), _rows(x)
    for block in row_blocks(rows):
        g = _weighted(grads[block], weight, kind)
        if mean is not None:
            sums[0, block] = g.sum(1)
        sums[1, block] = _normalised(rows, mean, rstd, block).mul_(g).sum(1)
    return sums.view(2, *rstd.shape)


def norm_backward_apply(
    sums: Tensor,
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    *,
    n: int,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(dx, dweight, dbias)` for the part here; `sums` is over all ranks, `n` the whole size.

    `dweight` and `dbias` are sums over the rows here; a parameter that is not there has none.
    """
    kind = accumulation_dtype(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight_dtype = None if weight is None else weight.dtype
    dweight, dbias = (
        None if dtype is None else torch.zeros(x.shape[-1], dtype=kind, device=x.device)
        for dtype in (weight_dtype, bias_dtype)
    )
    grads, rows, flat_sums = _rows(grad), _rows(x), sums.reshape(2, -1)
    for block in row_blocks(rows):
        normal = _normalised(rows, mean, rstd, block)
        if dbias is not None:
            dbias += grads[block].sum(0, dtype=kind)
        if dweight is not None:
            dweight += (grads[block] * normal).sum(0)
        g = _weighted(grads[block], weight, kind)
        g.addcmul_(normal, flat_sums[1, block, None], value=-1 / n)
        if mean is not None:
            g.sub_(flat_sums[0, block, None], alpha=1 / n)
        _rows(dx)[block] = g.mul_(rstd.reshape(-1, 1)[block])
    return dx, _cast(dweight, weight_dtype), _cast(dbias, bias_dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _normalised(rows: Tensor, mean: Tensor | None, rstd: Tensor, block: slice) -> Tensor:
    """The normalised rows of a block, in a buffer of their own."""
    scale = rstd.reshape(-1, 1)[block]
    if mean is None:
        return rows[block] * scale
    return (rows[block] - mean.reshape(-1, 1)[block]).mul_(scale)


def _weighted(grad: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of the normalised rows, in a buffer of its own."""
    return grad.to(dtype, copy=True) if weight is None else grad.to(dtype) * weight


def _cast(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if grad is None else grad.to(dtype)
