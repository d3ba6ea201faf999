"""Operators in terms of others, for layouts that split what an operator needs whole.

Each entry is a function of the operator's own arguments, in torch operators that have rules for
such splits: a sum over a split dim stays pending. Maxima are detached, since only a pending sum has
an adjoint. A loss is the sum of its rows, divided by their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.compiler.graph.fragment import Fragment, read, traced
from meshwright.compiler.graph.ir import Arg, NodeType, Op, TensorType
from meshwright.compiler.graph.slots import filled

aten = torch.ops.aten

DECOMPOSITIONS: dict[Op, Callable[..., Any]] = {}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def decomposes(*ops: Op) -> Callable[[_Function], _Function]:
    """Register a function as the decomposition of these operators."""

    def register(function: _Function) -> _Function:
        DECOMPOSITIONS.update(dict.fromkeys(ops, function))
        return function

    return register


@lru_cache(maxsize=4096)
def decompose(
    op: Op,
    args: tuple[Arg, ...],
    kwargs: tuple[tuple[str, Arg], ...],
    operands: tuple[TensorType, ...],
    type: NodeType,
) -> Fragment:
    """The calls behind `op` for operands of these types, with results of `type`; `args` hold a
    `Slot` for each operand."""
    types = type if isinstance(type, tuple) else (type,)
    dtypes = [each.dtype for each in types if each is not None]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        named = {key: filled(value, tensors) for key, value in kwargs}
        found = DECOMPOSITIONS[op](*filled(args, tensors), **named)
        results = found if isinstance(found, tuple) else (found,)
        return [each.to(dtype) for each, dtype in zip(results, dtypes, strict=True)]

    with torch.no_grad():
        graph = traced(run, operands)
    *nodes, output = graph.nodes
    parameters, calls = nodes[: len(operands)], nodes[len(operands) :]
    return read(f"a part of `{op}`", parameters, output.args[0], calls)


def _count(x: Tensor, dims: list[int]) -> int:
    return math.prod(x.shape[dim] for dim in dims)


def _mean(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims, keepdim=True) / _count(x, dims)


def _as_wide(x: Tensor, other: Tensor | None) -> Tensor:
    """`x` in the wider of two types: norms compute in that of their parameters."""
    return x if other is None else x.to(torch.promote_types(x.dtype, other.dtype))


@decomposes(aten._native_batch_norm_legit_functional.default)
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """Statistics of the whole batch, as on one rank; the running ones carry no gradient."""
    x = _as_wide(x, running_mean)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    across = [1, -1, *[1] * (x.dim() - 2)]
    if not training:
        mean, var = running_mean.view(across), running_var.view(across)
    else:
        mean = _mean(x, dims)
        var = _mean((x - mean).square(), dims)
    rstd = torch.rsqrt(var + eps)
    y = (x - mean) * rstd
    if weight is not None:
        y = y * weight.view(across)
    if bias is not None:
        y = y + bias.view(across)
    flat_mean, flat_var, flat_rstd = (each.reshape(-1) for each in (mean, var, rstd))
    if training:
        count = _count(x, dims)
        unbiased = flat_var.detach() * (count / max(count - 1, 1))
        running_mean = running_mean * (1 - momentum) + flat_mean.detach() * momentum
        running_var = running_var * (1 - momentum) + unbiased * momentum
    else:
        flat_mean, flat_rstd = flat_mean[:0], flat_rstd[:0]  # as torch's: nothing is kept
    return y, flat_mean, flat_rstd, running_mean, running_var


@decomposes(aten.group_norm.default)
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    x = _as_wide(x, weight)
    grouped = x.view(x.shape[0], num_groups, x.shape[1] // num_groups, *x.shape[2:])
    dims = list(range(2, grouped.dim()))
    centred = grouped - _mean(grouped, dims)
    y = (centred * torch.rsqrt(_mean(centred.square(), dims) + eps)).view(x.shape)
    across = [1, -1, *[1] * (x.dim() - 2)]
    y = y if weight is None else y * weight.view(across)
    return y if bias is None else y + bias.view(across)


@decomposes(aten._log_softmax.default)
def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted = x - x.detach().amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


@decomposes(aten.log_softmax.int)
def log_softmax_int(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return log_softmax(x if dtype is None else x.to(dtype), dim, False)


@decomposes(aten._softmax.default)
def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    exponentials = (x - x.detach().amax(dim, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


@decomposes(aten.softmax.int)
def softmax_int(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return softmax(x if dtype is None else x.to(dtype), dim, False)


@decomposes(aten.logsumexp.default)
def logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    largest = x.detach().amax(dim, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0)
    total = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return total if keepdim else total.squeeze(dim)


@decomposes(aten.var.correction)
def var(
    x: Tensor,
    dim: list[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    dims = list(range(x.dim())) if not dim else [d % x.dim() for d in dim]
    centred = x - _mean(x, dims)
    squares = (centred.abs() if x.is_complex() else centred).square().sum(dims, keepdim=keepdim)
    return squares / max(_count(x, dims) - (1 if correction is None else correction), 0)


@decomposes(aten.std.correction)
def std(x: Tensor, dim: list[int] | None = None, **options: Any) -> Tensor:
    """As torch's, it has no gradient where it is 0."""
    variance = var(x, dim, **options)
    constant = variance == 0
    return variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)


@decomposes(aten.var.dim)
def var_dim(
    x: Tensor, dim: list[int] | None, unbiased: bool = True, keepdim: bool = False
) -> Tensor:
    return var(x, dim, correction=int(unbiased), keepdim=keepdim)


@decomposes(aten.std.dim)
def std_dim(
    x: Tensor, dim: list[int] | None, unbiased: bool = True, keepdim: bool = False
) -> Tensor:
    return std(x, dim, correction=int(unbiased), keepdim=keepdim)


@decomposes(aten.var.default)
def var_all(x: Tensor, unbiased: bool = True) -> Tensor:
    return var(x, correction=int(unbiased))


@decomposes(aten.std.default)
def std_all(x: Tensor, unbiased: bool = True) -> Tensor:
    return std(x, correction=int(unbiased))


def _reduced(rows: Tensor, reduction: int) -> Tensor:
    """Rows of a loss as torch reduces them: 0 not at all, 1 to their mean, 2 to their sum."""
    if reduction == 0:
        return rows
    return rows.sum() / rows.numel() if reduction == 1 else rows.sum()


@decomposes(aten.l1_loss.default)
def l1_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _reduced((x - target).abs(), reduction)


@decomposes(aten.smooth_l1_loss.default)
def smooth_l1_loss(x: Tensor, target: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    distance = (x - target).abs()
    if beta == 0:
        return _reduced(distance, reduction)
    near = distance.square() * (0.5 / beta)
    return _reduced(torch.where(distance < beta, near, distance - 0.5 * beta), reduction)


@decomposes(aten.huber_loss.default)
def huber_loss(x: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    distance = (x - target).abs()
    near, far = distance.square() * 0.5, delta * (distance - 0.5 * delta)
    return _reduced(torch.where(distance < delta, near, far), reduction)


@decomposes(aten.kl_div.default)
def kl_div(x: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False) -> Tensor:
    if log_target:
        return _reduced(target.exp() * (target - x), reduction)
    return _reduced(torch.special.xlogy(target, target) - target * x, reduction)


@decomposes(aten.binary_cross_entropy.default)
def binary_cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """Logarithms end at -100 and the slope is finite at 0 and 1, as torch's are."""
    held, least = x.detach(), max(1e-12, torch.finfo(x.dtype).tiny)
    hit, miss = held.log().clamp(min=-100), (-held).log1p().clamp(min=-100)
    slope = (held - target.detach()) / ((1 - held) * held).clamp(min=least)
    rows = (target - 1) * miss - target * hit + slope * (x - held)
    return _reduced(rows if weight is None else rows * weight, reduction)


@decomposes(aten.binary_cross_entropy_with_logits.default)
def binary_cross_entropy_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    softplus = F.softplus(-x, threshold=40)  # beyond it float64 has no digits of the difference
    positive = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    rows = (1 - target) * x + positive * softplus
    return _reduced(rows if weight is None else rows * weight, reduction)


@decomposes(aten.nll_loss_nd.default, aten.nll_loss.default)
def nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
) -> Tensor:
    """`x[n, c, ...]` are log-probabilities; the mean is over the weights of labels that count."""
    classes = x if x.dim() > 1 else x.unsqueeze(0)
    labels = target.view(classes.shape[0], *classes.shape[2:])
    counts = labels != ignore_index
    safe = torch.where(counts, labels, 0)
    share = counts.to(x.dtype) if weight is None else weight[safe] * counts
    picked = classes.gather(1, safe.unsqueeze(1)).squeeze(1)
    rows = -picked.masked_fill(~counts, 0) * share
    if reduction == 0:
        return rows.view(target.shape)
    return rows.sum() / share.sum() if reduction == 1 else rows.sum()


def _gates(x: Tensor, count: int) -> list[Tensor]:
    """Equal parts of the last dim."""
    size = x.shape[-1] // count
    return [x.narrow(-1, i * size, size) for i in range(count)]


def _both(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a cell makes of its input and of its state, before they meet."""
    return F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)


@decomposes(aten.rnn_tanh_cell.default)
def rnn_tanh_cell(x: Tensor, h: Tensor, *weights: Tensor) -> Tensor:
    return torch.tanh(torch.add(*_both(x, h, *weights)))


@decomposes(aten.rnn_relu_cell.default)
def rnn_relu_cell(x: Tensor, h: Tensor, *weights: Tensor) -> Tensor:
    return torch.relu(torch.add(*_both(x, h, *weights)))


@decomposes(aten.gru_cell.default)
def gru_cell(x: Tensor, h: Tensor, *weights: Tensor) -> Tensor:
    of_x, of_h = _both(x, h, *weights)
    reset_x, update_x, new_x = _gates(of_x, 3)
    reset_h, update_h, new_h = _gates(of_h, 3)
    update = torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return new + update * (h - new)


@decomposes(aten.lstm_cell.default)
def lstm_cell(x: Tensor, state: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, Tensor]:
    h, c = state
    entry, forget, cell, out = _gates(torch.add(*_both(x, h, *weights)), 4)
    c = torch.sigmoid(forget) * c + torch.sigmoid(entry) * torch.tanh(cell)
    return torch.sigmoid(out) * torch.tanh(c), c
