"""The pieces of hand-written tensor parallelism: autograd functions over raw collectives.

Megatron-LM's operators (Shoeybi et al. 2019; Korthikanti et al. 2022). Activations are
`[s, b, d]`, so that collectives over the sequence need no copy; a column-split linear overlaps its
input's gradient reduction with its weight's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

Group = dist.ProcessGroup


def gathered(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """`[s/n, ...]` to `[s, ...]`, complete once the work has been waited for."""
    whole = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    work = dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=True)
    return whole, work


def scattered(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """The sum over the group of `[s, ...]`, of which this rank gets `[s/n, ...]`."""
    part = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    work = dist.reduce_scatter_tensor(part, x.contiguous(), group=group, async_op=True)
    return part, work


class ColumnLinear(torch.autograd.Function):
    """A linear whose output features are split; its input is whole, or split by sequence."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sequence: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence, ctx.biased = group, sequence, bias is not None
        if sequence:
            x, work = gathered(x, group)
            work.wait()
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        whole = x
        if ctx.sequence:  # the shard was saved: gather it again
            whole, regather = gathered(x, ctx.group)
        grad_x = grad @ weight
        if ctx.sequence:
            regather.wait()
            grad_x, reduction = scattered(grad_x, ctx.group)
        else:
            reduction = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        rows = grad.flatten(0, 1)
        grad_weight = rows.t() @ whole.flatten(0, 1)
        grad_bias = rows.sum(0) if ctx.biased else None
        reduction.wait()
        return grad_x, grad_weight, grad_bias, None, None


class Reduce(torch.autograd.Function):
    """Megatron's g: partial sums to the whole, at the end of a row-split linear or embedding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ReduceScatter(torch.autograd.Function):
    """Partial sums to this rank's part of the sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        part, work = scattered(x, group)
        work.wait()
        return part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole, work = gathered(grad, ctx.group)
        work.wait()
        return whole, None


class GatherFeatures(torch.autograd.Function):
    """`[..., v/n]` to `[..., v]`; backward keeps this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        stacked, work = gathered(x.unsqueeze(0), group)
        work.wait()
        return stacked.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size(), -1)[ctx.group.rank()], None


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `[n, v/k]` logits and `[n]` targets, in the logits' own memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        most = logits.amax(-1)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        logits.sub_(most.unsqueeze(-1))
        targets = targets - group.rank() * logits.shape[-1]
        absent = (targets < 0) | (targets >= logits.shape[-1])
        index = targets.masked_fill(absent, 0).unsqueeze(-1)
        sums = torch.empty(2, len(logits))  # the target's logit, the sum of exponentials
        sums[0] = logits.gather(-1, index).squeeze(-1).masked_fill_(absent, 0)
        torch.sum(logits.exp_(), -1, out=sums[1])
        dist.all_reduce(sums, group=group)
        logits.div_(sums[1].unsqueeze(-1))
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(logits, index, absent)
        return (sums[1].log() - sums[0]).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax, index, absent = ctx.saved_tensors
        softmax.scatter_add_(-1, index, absent.to(softmax.dtype).sub_(1).unsqueeze(-1))
        return softmax.mul_(grad / len(softmax)), None, None
