"""Tokens to the slots of experts and back, by indices, on one rank.

Tokens come in groups `[g, s, d]`. Each has `k` choices, whose slots in its group are
`slot[g, s, k]`; -1 is a choice that was dropped. No two choices have one slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 8
"""Up to this many entries are taken one by one; for more, the dim is sorted."""


def top(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest entries of the last dim, largest first; of equal entries
    the first comes first."""
    if count > _FEW:
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        return order[..., :count].contiguous()
    found = [scores.argmax(-1, keepdim=True)]
    for _ in range(count - 1):
        scores = scores.scatter(-1, found[-1], -torch.inf)
        found.append(scores.argmax(-1, keepdim=True))
    return torch.cat(found, -1)


def positions(expert: Tensor) -> Tensor:
    """By entry of the last dim: how many of those before it are equal to it."""
    values, order = expert.sort(dim=-1, stable=True)
    place = torch.arange(expert.shape[-1], device=expert.device).expand_as(expert)
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[..., 1:] = values[..., 1:] != values[..., :-1]
    start = place.where(begins, 0).cummax(-1).values
    return torch.empty_like(expert).scatter_(-1, order, place - start)


def dispatch(x: Tensor, slot: Tensor, weight: Tensor | None, num_slots: int) -> Tensor:
    """`x[g, s, d]` in slots, `[g, num_slots, d]`, with zeros in those that nothing has; times
    `weight[g, s, k]` where it is given."""
    groups, tokens, choices = slot.shape
    entries = tokens * choices
    places = slot.where(slot >= 0, num_slots).flatten(1)
    # Which choice has a slot; what is dropped goes to one more, which is cut off.
    source = places.new_full((groups, num_slots + 1), entries)
    source.scatter_(1, places, torch.arange(entries, device=x.device).expand(groups, -1))
    source = source[:, :num_slots]
    empty = source == entries
    source = source.masked_fill(empty, 0)
    token = (source // choices).unsqueeze(-1).expand(-1, -1, x.shape[-1])
    rows = x.gather(1, token)
    if weight is not None:
        rows = (rows * weight.flatten(1).gather(1, source).unsqueeze(-1)).to(x.dtype)
    return rows.masked_fill_(empty.unsqueeze(-1), 0)


def combine(y: Tensor, slot: Tensor, weight: Tensor | None) -> Tensor:
    """The sum over the choices of each token of what is in their slots, `[g, s, d]`; each times
    `weight[g, s, k]` where it is given."""
    total: Tensor | None = None
    for choice in range(slot.shape[2]):
        rows = _rows(y, slot[:, :, choice])
        if weight is not None:
            rows = rows * weight[:, :, choice].unsqueeze(-1)
        total = rows if total is None else total + rows
    assert total is not None
    return total.to(y.dtype)


def combine_weight(grad: Tensor, y: Tensor, slot: Tensor) -> Tensor:
    """The products of `grad[g, s, d]` with what is in the slots of each token: `[g, s, k]`."""
    choices = range(slot.shape[2])
    return torch.stack([(grad * _rows(y, slot[:, :, j])).sum(-1) for j in choices], -1)


def _rows(y: Tensor, slot: Tensor) -> Tensor:
    """What is in these slots, and zeros for dropped choices."""
    dropped = (slot < 0).unsqueeze(-1)
    rows = y.gather(1, slot.clamp(min=0).unsqueeze(-1).expand(-1, -1, y.shape[-1]))
    return rows.masked_fill_(dropped, 0)
