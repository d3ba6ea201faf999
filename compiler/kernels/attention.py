"""Scaled dot product attention on local heads, by torch's fused kernels where they apply.

`q[b, h, s, d]`, `k[b, h_kv, t, d]`, `v[b, h_kv, t, e]`, with h a multiple of h_kv: a key and value
head serves a group of neighbouring query heads. `bias` broadcasts to `[b, h, s, t]`; a bool one
says which keys are seen. A causal row i sees the keys 0 to i. A row that sees no key has output 0.
As in `F.scaled_dot_product_attention`, every dim before h is a batch dim; there may be none.

Forward and backward choose their kernel by one function of their arguments: the shape and type of a
saved log-sum-exp depend on the kernel. Dropout is the hash of `dropout.py` over the global
`[b, h, s, t]`, block by block; no mask is saved.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from meshwright.compiler.kernels.attention_fused import (
    CPU,
    EFFICIENT,
    FLASH,
    AttentionKernel,
    AttentionOptions,
)
from meshwright.compiler.kernels.attention_math import MATH
from meshwright.compiler.kernels.hashing import RandomIndex

_HALF = (torch.float16, torch.bfloat16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    index: RandomIndex | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out[b, h, s, e], lse)`; `index`, of the global `[b, h, s, t]`, goes with `dropout_p`."""
    options = _options(q, is_causal, scale, dropout_p, index)
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v, bias = _four_dims(q, k, v, bias)
    out, lse = _kernel(q, k, v, bias, options).forward(q, k, v, bias, options)
    return out.reshape(shape), lse


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    index: RandomIndex | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attention`, of some of the keys that rows see: `lse[b, h, s]` is -inf for a row that sees
    none of these. `attention_backward` takes the output and logarithm over all keys."""
    out, lse = attention(
        q, k, v, bias, is_causal=is_causal, scale=scale, dropout_p=dropout_p, index=index
    )
    lse = lse[..., : q.shape[2]]
    if bias is None:
        return out, lse
    seen = bias if bias.dtype == torch.bool else bias != -torch.inf
    if is_causal:
        square = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        seen = seen & square.tril_()
    blind = ~seen.any(-1)
    return out.masked_fill(blind.unsqueeze(-1), 0), lse.masked_fill(blind, -torch.inf)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    index: RandomIndex | None = None,
    need_bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(dq, dk, dv, dbias)`, of the shapes of the operands; `dbias` is None unless asked for."""
    options = _options(q, is_causal, scale, dropout_p, index)
    given = q, k, v
    q, k, v, whole = _four_dims(q, k, v, bias)
    grad_out, out = (x.reshape(*q.shape[:3], v.shape[-1]) for x in (grad_out, out))
    kernel = _kernel(q, k, v, whole, options)
    if need_bias_grad and not kernel.has_bias_grad:
        kernel = MATH
    *grads, dbias = kernel.backward(grad_out, q, k, v, out, lse, whole, options, need_bias_grad)
    dq, dk, dv = (grad.reshape(x.shape) for grad, x in zip(grads, given, strict=True))
    if bias is None or dbias is None:
        return dq, dk, dv, None
    return dq, dk, dv, _bias_grad(dbias, bias, given[0])


def _options(
    q: Tensor, is_causal: bool, scale: float | None, dropout_p: float, index: RandomIndex | None
) -> AttentionOptions:
    factor = 1 / sqrt(q.shape[-1]) if scale is None else scale
    return AttentionOptions(is_causal, factor, dropout_p, index)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: AttentionOptions
) -> AttentionKernel:
    """The kernel for these operands: fused where there is one, else exact mathematics."""
    width = q.shape[-1]
    same = v.shape[-1] == width and q.dtype == k.dtype == v.dtype
    if options.dropout_p or not same or 0 in (*q.shape, *k.shape):
        return MATH
    if q.device.type == "cpu":
        return CPU if q.dtype in (*_HALF, torch.float32, torch.float64) else MATH
    if q.device.type != "cuda":
        return MATH
    square = not options.is_causal or q.shape[2] == k.shape[2]  # flash aligns the other corner
    if q.dtype in _HALF and bias is None and square and width <= 256 and width % 8 == 0:
        return FLASH
    aligned = width % 8 == 0 if q.dtype in _HALF else q.dtype == torch.float32 and width % 4 == 0
    return EFFICIENT if aligned else MATH


def _four_dims(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The operands with one batch dim and one dim of heads; `bias` with broadcasting dims of 1."""
    lead = q.shape[:-3]
    if bias is not None:
        if bias.dim() > 4:
            bias = bias.expand(*lead, *bias.shape[-3:]).flatten(0, -4)
        bias = _four(bias)
    return _four(q), _four(k), _four(v), bias


def _four(x: Tensor) -> Tensor:
    if x.dim() < 4:
        return x.reshape((1,) * (4 - x.dim()) + x.shape)
    return x.flatten(0, -4)


def _bias_grad(grad: Tensor, bias: Tensor, q: Tensor) -> Tensor:
    """The gradient of the bias as it was given, from that of its form with four dims."""
    if bias.dim() > 4:
        grad = grad.reshape(*q.shape[:-3], *grad.shape[1:]).sum_to_size(bias.shape)
    return grad.reshape(bias.shape)
