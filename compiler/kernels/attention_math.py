"""Attention as mathematics, exact for every option, in blocks of rows to bound its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.compiler.kernels.attention_fused import (
    AttentionGrads,
    AttentionKernel,
    AttentionOptions,
)
from meshwright.compiler.kernels.blocks import (
    accumulation_dtype,
    block_elements,
    enough,
    has_data,
)
from meshwright.compiler.kernels.dropout import keep_scale

# Fewer rows than this make the products with keys and values slower than the memory they save.
_FEWEST_ROWS = 32


@dataclass(frozen=True)
class _Block:
    """Batches `batch` and rows `rows`, which see the first `keys` keys."""

    batch: slice
    rows: slice
    keys: int


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    kind = accumulation_dtype(q.dtype)
    batch, heads, rows, _ = q.shape
    # Heads are last but one in memory, as the fused kernels leave them, for the next view to merge.
    out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, heads, rows, dtype=kind)
    for block in _blocks(q, k, options):
        scores = _scores(q, k, bias, options, block)
        largest = scores.amax(-1, keepdim=True)
        largest.masked_fill_(largest == -torch.inf, 0)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        total.masked_fill_(total == 0, 1)
        lse[block.batch, :, block.rows] = total.log().add_(largest).squeeze(-1)
        if options.dropout_p:
            weights.mul_(_kept(weights, options, block))
        mixed = _grouped(weights, k) @ v[block.batch, :, : block.keys].to(kind)
        out[block.batch, :, block.rows] = mixed.view(*weights.shape[:3], -1).div_(total)
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    options: AttentionOptions,
    need_bias_grad: bool,
) -> AttentionGrads:
    kind = accumulation_dtype(q.dtype)
    dq = q.new_empty(q.shape)
    dk, dv = (torch.zeros_like(x, dtype=kind) for x in (k, v))
    dbias = None
    if bias is not None and need_bias_grad:
        dbias = torch.zeros_like(bias, dtype=kind, memory_format=torch.contiguous_format)
    for block in _blocks(q, k, options):
        here = (block.batch, slice(None), block.rows)
        keys = (block.batch, slice(None), slice(0, block.keys))
        weights = _scores(q, k, bias, options, block).sub_(lse[here].unsqueeze(-1)).exp_()
        grad = grad_out[here].to(kind)
        dscores, dropped = _through_values(grad, v[keys].to(kind), weights, options, block)
        dv[keys] += _grouped(dropped, k).mT @ _grouped(grad, k)
        dscores.sub_((grad * out[here]).sum(-1, keepdim=True)).mul_(weights)
        if dbias is not None:
            _add_bias_grad(dbias, dscores, block)
        flat = _grouped(dscores, k)
        dq[here] = (flat @ k[keys].to(kind)).mul_(options.scale).view(*grad.shape[:3], -1)
        dk[keys] += (flat.mT @ _grouped(q[here].to(kind), k)).mul_(options.scale)
    bias_grad = None if dbias is None or bias is None else dbias.to(bias.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), bias_grad


MATH = AttentionKernel(_forward, _backward, has_bias_grad=True)


def _blocks(q: Tensor, k: Tensor, options: AttentionOptions) -> Iterator[_Block]:
    """Cut batch and rows so that the scores of a block have at most the elements of a block."""
    batch, heads, rows, _ = q.shape
    width = max(1, heads * k.shape[2])
    limit = block_elements(q.device)
    tall = max(_FEWEST_ROWS, limit // width)
    many = max(1, limit // (width * max(1, rows)))
    starts = range(0, rows, tall)
    if not has_data(q):
        # Where rows see only the keys before them, the last see most.
        starts = starts[-2:]
    for first in enough(range(0, batch, many), q):
        for start in starts:
            stop = min(start + tall, rows)
            keys = min(stop, k.shape[2]) if options.is_causal else k.shape[2]
            yield _Block(slice(first, min(first + many, batch)), slice(start, stop), keys)


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, options: AttentionOptions, block: _Block
) -> Tensor:
    """The scaled, biased and masked scores of a block, `[b, h, rows, keys]`."""
    kind = accumulation_dtype(q.dtype)
    queries = q[block.batch, :, block.rows].to(kind)
    keys = k[block.batch, :, : block.keys].to(kind)
    scores = (_grouped(queries, k) @ keys.mT).mul_(options.scale)
    scores = scores.view(*queries.shape[:3], block.keys)
    if bias is not None:
        part = bias[_bias_part(bias, block)]
        if part.dtype == torch.bool:
            scores.masked_fill_(~part, -torch.inf)
        else:
            scores.add_(part)
    if options.is_causal:
        unseen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device)
        scores.masked_fill_(unseen.triu_(1 + block.rows.start), -torch.inf)
    return scores


def _through_values(
    grad: Tensor, v: Tensor, weights: Tensor, options: AttentionOptions, block: _Block
) -> tuple[Tensor, Tensor]:
    """The gradient of the weights before dropout, and the weights after it."""
    dweights = (_grouped(grad, v) @ v.mT).view(weights.shape)
    if not options.dropout_p:
        return dweights, weights
    kept = _kept(weights, options, block)
    return dweights.mul_(kept), kept.mul_(weights)


def _kept(weights: Tensor, options: AttentionOptions, block: _Block) -> Tensor:
    index = options.index
    assert index is not None
    index = index.narrow(0, block.batch.start, weights.shape[0])
    index = index.narrow(2, block.rows.start, weights.shape[2]).narrow(3, 0, block.keys)
    return keep_scale(weights.shape, options.dropout_p, index, weights.dtype, weights.device)


def _bias_part(bias: Tensor, block: _Block) -> tuple[slice, slice, slice, slice]:
    """A block's part of the bias; a dim of 1 broadcasts."""
    whole = slice(None)
    return (
        whole if bias.shape[0] == 1 else block.batch,
        whole,
        whole if bias.shape[2] == 1 else block.rows,
        whole if bias.shape[3] == 1 else slice(0, block.keys),
    )


def _add_bias_grad(dbias: Tensor, dscores: Tensor, block: _Block) -> None:
    part = dbias[_bias_part(dbias, block)]
    part += dscores.sum_to_size(part.shape)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """`[b, h, rows, n]` as `[b, h_kv, group * rows, n]`: one product for all heads of a group."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, k.shape[1], heads // k.shape[1] * rows, width)
