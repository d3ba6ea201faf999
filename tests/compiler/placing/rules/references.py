"""Composites by their definitions, in the arguments of their mesh operators."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.compiler.graph.ir import MeshOp
from tests.compiler.placing.rules.brute import Sample


def embedding(weight: Tensor, index: Tensor, padding_idx: int | None) -> Tensor:
    return weight[index]


def embedding_backward(grad: Tensor, index: Tensor, num_rows: int, padding_idx: int) -> Tensor:
    kept = (index != padding_idx).unsqueeze(-1)
    rows = (grad * kept).flatten(0, -2)
    return grad.new_zeros(num_rows, grad.shape[-1]).index_add(0, index.flatten(), rows)


def top(scores: Tensor, count: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def positions(expert: Tensor) -> Tensor:
    equal = expert.unsqueeze(-1) == expert.unsqueeze(-2)
    return equal.long().tril(-1).sum(-1)


def dispatch(x: Tensor, slot: Tensor, weight: Tensor | None, num_slots: int) -> Tensor:
    return torch.einsum("gskn,gsd->gnd", _places(slot, weight, num_slots, x), x)


def combine(y: Tensor, slot: Tensor, weight: Tensor | None) -> Tensor:
    return torch.einsum("gskn,gnd->gsd", _places(slot, weight, y.shape[1], y), y)


def combine_weight(grad: Tensor, y: Tensor, slot: Tensor, dtype: torch.dtype) -> Tensor:
    places = _places(slot, None, y.shape[1], y)
    return torch.einsum("gsd,gnd,gskn->gsk", grad, y, places)


def _places(slot: Tensor, weight: Tensor | None, num_slots: int, like: Tensor) -> Tensor:
    """A one where a choice has a slot, or its weight."""
    found = (slot.unsqueeze(-1) == torch.arange(num_slots)).to(like.dtype)
    return found if weight is None else found * weight.unsqueeze(-1)


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
    kind: str,
    bias_dtype: torch.dtype | None,
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
        None if bias_dtype is None else grad.sum(rows).to(bias_dtype),
    )


def norm_stats(x: Tensor, kind: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    if kind == "layer":
        return torch.stack([mean.squeeze(-1), (x - mean).square().sum(-1)])[None]
    return x.square().sum(-1)[None, None]


def norm_finish(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    ((mean, squares),) = stats
    rstd = (squares / x.shape[-1] + eps).rsqrt()
    return (x - mean[..., None]) * rstd[..., None] * weight + bias, mean, rstd


def norm_backward_sums(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, kind: str
) -> Tensor:
    scaled = grad * weight
    normal = (x - mean[..., None]) * rstd[..., None]
    return torch.stack([scaled.sum(-1), (scaled * normal).sum(-1)])


def norm_backward_apply(
    sums: Tensor,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    kind: str,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    normal = (x - mean[..., None]) * rstd[..., None]
    centre, along = sums[..., None] / x.shape[-1]
    rows = tuple(range(x.dim() - 1))
    dx = rstd[..., None] * (grad * weight - centre - normal * along)
    return dx, (grad * normal).sum(rows), grad.sum(rows)


def cross_entropy_stats(logits: Tensor, target: Tensor, *rest: Any) -> Tensor:
    picked = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return torch.stack([logits.logsumexp(-1), picked, logits.sum(-1)])[None]


def cross_entropy_combine(stats: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """From one part, with as much smoothing over as many classes as it says."""
    ((lse, picked, total),), (_, ignored, smoothing, num_classes) = stats, rest
    spread = (lse * num_classes - total) * smoothing / num_classes
    loss = (lse - picked) * (1 - smoothing) + spread
    return loss.masked_fill(target == ignored, 0), lse


def dropout(x: Tensor, p: float, op_id: int) -> Tensor:
    """Any elementwise function that is not linear."""
    return x.exp()


def random(like: Tensor, shape: Any, kind: str, dtype: torch.dtype, op_id: int) -> Tensor:
    """Any constant, of the shape of the operand."""
    return torch.ones_like(like)


def standard_gamma(x: Tensor, shape: Any, op_id: int) -> Tensor:
    """As `dropout`."""
    return x.exp()


def dirichlet(x: Tensor, shape: Any, op_id: int) -> Tensor:
    """Any function of rows."""
    return x.softmax(-1)


def poisson(x: Tensor, shape: Any, op_id: int) -> Tensor:
    """As `dropout`."""
    return x.exp()


def binomial(count: Tensor, p: Tensor, shape: Any, op_id: int) -> Tensor:
    """Any elementwise function that is linear in neither."""
    return (count * p).exp()


def extend(x: Tensor, dim: int, size: int) -> Tensor:
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([x, *(last for _ in range(size - x.shape[dim]))], dim)


def grouped_mm(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """Rows of the last group, which has no matrix, give zeros."""
    if x.dim() == 4:
        blocks = zip(x.unbind(1), weight.unbind(0), group.unbind(1), strict=True)
        return torch.stack([grouped_mm(*block) for block in blocks], 1)
    padded = functional.pad(weight, (0, 0, 0, 0, 0, 1))
    rows = x.unsqueeze(1) if x.dim() == 2 else x
    return (rows.unsqueeze(2) @ padded[group]).squeeze(2)


def grouped_mm_weight(x: Tensor, grad: Tensor, group: Tensor, num_groups: int) -> Tensor:
    if x.dim() == 4:
        blocks = zip(x.unbind(1), grad.unbind(1), group.unbind(1), strict=True)
        return torch.stack([grouped_mm_weight(*block, num_groups) for block in blocks])
    rows = x.unsqueeze(1) if x.dim() == 2 else x
    pairs = rows.unsqueeze(3) * grad.unsqueeze(2)
    zeros = x.new_zeros(num_groups, *pairs.shape[2:])
    return zeros.index_add(0, group.flatten(), pairs.flatten(0, 1))


def to_owners(
    x: Tensor, group: Tensor, experts: int, owners: int, maximum: int, axes: tuple[str, ...]
) -> Tensor:
    rows = x.unsqueeze(2).expand(-1, -1, group.shape[2], -1) if x.dim() == 3 else x
    return torch.einsum("gstqm,gstk->gqmk", _owned(group, experts, owners, maximum, x), rows)


def from_owners(
    y: Tensor, group: Tensor, experts: int, owners: int, axes: tuple[str, ...]
) -> Tensor:
    return torch.einsum("gstqm,gqmn->gstn", _owned(group, experts, owners, y.shape[2], y), y)


def owned_groups(
    group: Tensor, experts: int, owners: int, maximum: int, axes: tuple[str, ...]
) -> Tensor:
    found = _owned(group, experts, owners, maximum, group)
    each = experts // owners
    numbers = torch.einsum("gstqm,gst->gqm", found, group % each)
    return numbers.where(found.sum((1, 2)) > 0, each)


def _owned(group: Tensor, experts: int, owners: int, maximum: int, like: Tensor) -> Tensor:
    """A one where a row is the m-th of an owner: `[g, s, t, q, m]`."""
    found = like.new_zeros(*group.shape, owners, maximum)
    for g, rows in enumerate(group):
        taken = [0] * owners
        for s, t in itertools.product(*map(range, rows.shape)):
            owner = int(rows[s, t]) // (experts // owners)
            if owner < owners:
                found[g, s, t, owner, taken[owner]] = 1
                taken[owner] += 1
    return found


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
    """From the output and log-sum-exp of the forward, without a causal mask; linear in `grad`."""
    *_, scale, _, _, wants_bias = rest
    scale = scale or 1 / math.sqrt(q.shape[-1])
    repeats = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(repeats, 1) for t in (k, v))
    scores = q @ keys.transpose(-1, -2) * scale
    weights = ((scores if bias is None else scores + bias) - lse.unsqueeze(-1)).exp()
    dweights = grad @ values.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)
    dscores = weights * dweights
    dk, dv = dscores.transpose(-1, -2) @ q * scale, weights.transpose(-1, -2) @ grad
    dk, dv = (t.unflatten(1, (-1, repeats)).sum(2) for t in (dk, dv))
    dbias = dscores.sum_to_size(bias.shape) if bias is not None and wants_bias else None
    return dscores @ keys * scale, dk, dv, dbias


def attention_backward_sample(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Sample:
    options = (False, None, 0.0, 0)
    out, lse = attention(q, k, v, bias, *options)
    args = (torch.randn_like(out), q, k, v, out, lse, bias, *options, bias is not None)
    return Sample(MeshOp("attention_backward"), args, {}, attention_backward, gradients=False)


def panel_product(a: Tensor, b: Tensor, form: str) -> Tensor:
    if form == "tn":
        return a.flatten(0, -2).t() @ b.flatten(0, -2)
    return a @ (b if form == "nn" else b.t())


def block_lookup(block: Tensor, index: Tensor, offset: int, num_rows: int) -> Tensor:
    return block[index - offset]


def block_lookup_backward(
    grad: Tensor, index: Tensor, size: int, offset: int, padding_idx: int
) -> Tensor:
    zeros = grad.new_zeros((size, grad.shape[-1]))
    return zeros.index_add(0, index.flatten() - offset, grad.flatten(0, -2))
