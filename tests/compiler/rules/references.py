"""Composites by their definitions, in the arguments of their mesh operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.compiler.ir import MeshOp
from tests.compiler.rules.brute import Sample


def embedding(weight: Tensor, index: Tensor, padding_idx: int | None) -> Tensor:
    return weight[index]


def embedding_backward(
    grad: Tensor, index: Tensor, weight_like: Tensor, padding_idx: int | None
) -> Tensor:
    place = -1 if padding_idx is None else padding_idx
    return torch.ops.aten.embedding_dense_backward(grad, index, len(weight_like), place, False)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    rows = functional.cross_entropy(
        logits.flatten(0, -2),
        target.flatten(),
        class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return rows.view(target.shape), logits.logsumexp(-1)


def cross_entropy_backward(
    grad_rows: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *rest: Any
) -> Tensor:
    """From the log-sum-exp that is handed over, whatever it is: rows do not mix."""
    with torch.enable_grad():
        own = logits.detach().requires_grad_()
        rows, _ = cross_entropy(own, target, *rest)
        (grad,) = torch.autograd.grad(rows, own, grad_rows)
    return grad * lse.unsqueeze(-1)


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    mean = x.mean(-1, keepdim=True) if kind == "layer" else torch.zeros_like(x[..., :1])
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (x - mean) * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y, (mean.squeeze(-1) if kind == "layer" else None), rstd.squeeze(-1)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias_like: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rstd = rstd.unsqueeze(-1)
    normal = (x if mean is None else x - mean.unsqueeze(-1)) * rstd
    scaled = grad if weight is None else grad * weight
    centre = scaled.mean(-1, keepdim=True) if kind == "layer" else 0
    dx = rstd * (scaled - centre - normal * (scaled * normal).mean(-1, keepdim=True))
    rows = tuple(range(x.dim() - 1))
    return (
        dx,
        None if weight is None else (grad * normal).sum(rows),
        None if bias_like is None else grad.sum(rows),
    )


def dropout(x: Tensor, p: float, op_id: int) -> Tensor:
    """Any elementwise function that is not linear."""
    return x.exp()


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    scale = rest[0] or 1 / math.sqrt(q.shape[-1])
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Linear in `grad`; `out` and `lse` are what the forward gave."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (q, k, v, bias)]
    wanted = [t for t in inputs if t is not None]
    with torch.enable_grad():
        found = torch.autograd.grad(attention(*inputs, *rest)[0], wanted, grad)  # type: ignore[arg-type]
    grads = (*found, None)[:4]
    return (grads[0] * lse.unsqueeze(-1), *grads[1:])


def attention_backward_sample(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Sample:
    options = (False, None, 0.0, 0)
    out, lse = attention(q, k, v, bias, *options)
    args = (torch.randn_like(out), q, k, v, out, lse, bias, *options, bias is not None)
    return Sample(MeshOp("attention_backward"), args, {}, attention_backward, gradients=False)
