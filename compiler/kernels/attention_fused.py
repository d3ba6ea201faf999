"""Torch's fused attention kernels behind one pair of signatures, for `attention.py` to choose from.

All operands have four dims, and there is no dropout: the kernels' random numbers are not ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.compiler.kernels.hashing import RandomIndex

_ALIGNED_ROWS = 32
"""The memory-efficient kernel keeps logarithms for a multiple of this many rows."""

# Queries, keys, values and bias; the last is None where it was not asked for.
AttentionGrads = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class AttentionOptions:
    """What holds for a whole call, forward and backward."""

    is_causal: bool
    scale: float
    dropout_p: float
    index: RandomIndex | None


class _Forward(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]: ...


class _Backward(Protocol):
    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        options: AttentionOptions,
        need_bias_grad: bool,
    ) -> AttentionGrads: ...


@dataclass(frozen=True)
class AttentionKernel:
    """A forward, and the backward that understands its log-sum-exp."""

    forward: _Forward
    backward: _Backward
    has_bias_grad: bool


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _dense(q),
        _dense(k),
        _dense(v),
        0.0,
        options.is_causal,
        attn_mask=_float_bias(bias, q.dtype),
        scale=options.scale,
    )
    return out, lse


def _cpu_backward(
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
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _dense(grad_out),
        _dense(q),
        _dense(k),
        _dense(v),
        _dense(out),
        lse.contiguous(),
        0.0,
        options.is_causal,
        attn_mask=_float_bias(bias, q.dtype),
        scale=options.scale,
    )
    return dq, dk, dv, None


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        _dense(q), _dense(k), _dense(v), 0.0, options.is_causal, False, scale=options.scale
    )
    return out, lse


def _flash_backward(
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
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        _dense(grad_out),
        _dense(q),
        _dense(k),
        _dense(v),
        _dense(out),
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        options.is_causal,
        unused,
        unused,
        scale=options.scale,
    )
    return dq, dk, dv, None


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        _dense(q),
        _every_head(k, q),
        _every_head(v, q),
        _aligned_bias(bias, q, k),
        True,
        0.0,
        options.is_causal,
        scale=options.scale,
    )
    return out, lse


def _efficient_backward(
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
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    wanted = need_bias_grad and bias is not None
    dq, dk, dv, dbias = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        _dense(grad_out),
        _dense(q),
        _every_head(k, q),
        _every_head(v, q),
        _aligned_bias(bias, q, k),
        _dense(out),
        F.pad(lse, (0, -lse.shape[-1] % _ALIGNED_ROWS), value=torch.inf),
        unused,
        unused,
        0.0,
        [True, True, True, wanted],
        options.is_causal,
        scale=options.scale,
    )
    summed = dbias.sum_to_size(bias.shape) if wanted and bias is not None else None
    return dq, _sum_groups(dk, k), _sum_groups(dv, v), summed


CPU = AttentionKernel(_cpu_forward, _cpu_backward, has_bias_grad=False)
FLASH = AttentionKernel(_flash_forward, _flash_backward, has_bias_grad=False)
EFFICIENT = AttentionKernel(_efficient_forward, _efficient_backward, has_bias_grad=True)


def _dense(x: Tensor) -> Tensor:
    """`x` with contiguous rows of d elements: the kernels assume them, and do not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _float_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias to add, in the operands' type: -inf where a bool one is False."""
    if bias is None or bias.dtype != torch.bool:
        return bias if bias is None else bias.to(dtype)
    return torch.zeros_like(bias, dtype=dtype).masked_fill_(~bias, -torch.inf)


def _aligned_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias in full shape, with rows that begin at multiples of 16 elements, as CUDA asks."""
    added = _float_bias(bias, q.dtype)
    if added is None:
        return None
    t = k.shape[2]
    added = added.expand(*added.shape[:3], t)
    if t % 16 or added.stride(-1) != 1:
        added = F.pad(added, (0, -t % 16)).narrow(-1, 0, t)
    return added.expand(*q.shape[:3], t)


def _every_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values for every query head."""
    group = q.shape[1] // x.shape[1]
    return _dense(x) if group == 1 else x.repeat_interleave(group, 1)


def _sum_groups(grad: Tensor, x: Tensor) -> Tensor:
    if grad.shape[1] == x.shape[1]:
        return grad
    batch, heads = x.shape[:2]
    return grad.reshape(batch, heads, -1, *grad.shape[2:]).sum(2)
