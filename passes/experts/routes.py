"""Routes: from the logits of a router to the experts of each token.

A route is one function of `logits[g, s, e]`, in groups of s tokens, of `Routing`, and of a bias
`[e]` by which experts are chosen and which weights do not have, or None. It gives, for
each of k choices of each token, the expert, the weight of what it returns, and the position among
the rows of that expert in that group; positions from the capacity on are dropped, and so are those
below zero. Without a capacity nothing is dropped, and all positions are 0. Written in torch
operators, so that it is captured, split over groups and differentiated as the model is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from meshwright.compiler.graph import experts as ops


@dataclass(frozen=True)
class Routing:
    """How tokens are routed: to `count` experts, `top` of them (or so many prototypes), each with a
    capacity of `factor` times its share of the tokens of a group; None where none is dropped."""

    route: str
    count: int
    top: int
    factor: float | None
    random_second: bool = False
    """Whether a token's second expert is taken with twice the probability of its weight."""

    def capacity(self, tokens: int) -> int:
        """The rows that one expert takes of a group of so many tokens."""
        assert self.factor is not None, "an expert without a capacity takes all"
        fair = tokens * self.top / self.count
        return max(1, min(tokens, math.ceil(round(self.factor * fair, 6))))


@dataclass(frozen=True)
class Routed:
    """What a route gives; all but `counted` and `shares` are `[g, s, k]`."""

    expert: Tensor
    weight: Tensor
    position: Tensor
    shares: Tensor
    """The probability of each expert, `[g, s, e]`, which sum to one in each prototype."""
    counted: Tensor | None
    """The choices that the auxiliary loss counts; None for a route that needs no such loss."""
    prototypes: int = 1


def topk(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> Routed:
    """GShard (2006.16668): the `top` most probable experts, with weights that sum to one. All first
    choices are placed before any second one, each in the order of the tokens."""
    shares = logits.softmax(-1)
    expert = _chosen(shares, routing.top, bias)
    weight = shares.gather(-1, expert)
    if routing.top > 1:
        weight = weight / weight.sum(-1, keepdim=True)
    position = _in_turn(expert, routing)
    if routing.random_second:
        second = 2 * weight[..., 1:].detach() > torch.rand_like(weight[..., 1:])
        taken = torch.cat([torch.ones_like(second[..., :1]), second], -1)
        # What is not taken has an expert of its own, past the others, and takes nobody's place.
        position = _in_turn(torch.where(taken, expert, routing.count), routing)
        position = torch.where(taken, position, -1)
    return Routed(expert, weight, position, shares, expert[..., :1])


def switch(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> Routed:
    """Switch (2101.03961): the most probable expert, weighted by its probability."""
    return topk(logits, routing, bias)


def prototype(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> Routed:
    """M6-T (2105.15082): experts in `top` prototypes; each token goes to the most probable expert
    of each, weighted by its probability there."""
    groups, tokens, experts = logits.shape
    each = experts // routing.top
    shares = logits.view(groups, tokens, routing.top, each).softmax(-1)
    own = _chosen(shares, 1, None if bias is None else bias.view(routing.top, each))
    weight = shares.gather(-1, own).squeeze(-1)
    first = torch.arange(0, experts, each, device=logits.device)
    expert = own.squeeze(-1) + first
    position = _in_turn(expert, routing)
    return Routed(expert, weight, position, shares.flatten(2), expert, routing.top)


def expert_choice(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> Routed:
    """Expert choice (2202.09368): each expert takes the tokens of a group to which it is most
    probable; a token may have none. Its choices are all experts."""
    assert bias is None, "experts that choose are balanced"
    shares = logits.softmax(-1)
    columns = shares.detach().transpose(1, 2)
    capacity = routing.capacity(logits.shape[1])
    chosen = ops.top(columns, capacity)
    places = torch.arange(capacity, device=logits.device).expand(chosen.shape)
    none = torch.full_like(columns, capacity, dtype=torch.int64)
    position = none.scatter(-1, chosen, places).transpose(1, 2)
    expert = torch.arange(routing.count, device=logits.device).expand(position.shape)
    return Routed(expert, shares, position, shares, None)


def _chosen(shares: Tensor, top: int, bias: Tensor | None) -> Tensor:
    """The experts with the largest shares, each with its bias."""
    scores = shares.detach()
    found: Tensor = ops.top(scores if bias is None else scores + bias, top)
    return found


def _in_turn(expert: Tensor, routing: Routing) -> Tensor:
    """The position of each choice `[g, s, k]` among those of its expert: all first choices come
    before the second ones."""
    if routing.factor is None:
        return torch.zeros_like(expert)
    groups, tokens, choices = expert.shape
    turns = expert.transpose(1, 2).reshape(groups, choices * tokens)
    places: Tensor = ops.positions(turns)
    return places.view(groups, choices, tokens).transpose(1, 2)


class Route(Protocol):
    """A function of logits, of how tokens are routed, and of a bias."""

    def __call__(self, logits: Tensor, routing: Routing, bias: Tensor | None = None) -> Routed: ...


ROUTES: Mapping[str, Route] = MappingProxyType(
    {
        "topk": topk,
        "switch": switch,
        "prototype": prototype,
        "expert_choice": expert_choice,
    }
)
"""By the name that a plan gives it."""


def auxiliary_loss(routed: Routed) -> Tensor | None:
    """E times the sum over experts of their share of the counted choices and of their mean
    probability, as the mean over groups and prototypes: 1 where both are even. The choices have no
    gradient."""
    if routed.counted is None:
        return None
    experts, tokens = routed.shares.shape[-1], routed.shares.shape[1]
    chosen = counts(routed.counted, experts).to(routed.shares.dtype) / tokens
    even = (chosen * routed.shares.mean(1)).sum(-1) * experts / routed.prototypes**2
    return even.mean()


def counts(expert: Tensor, experts: int) -> Tensor:
    """How many choices `[g, s, k]` are of each expert, by group: `[g, e]`."""
    flat = expert.flatten(1)
    return flat.new_zeros((flat.shape[0], experts)).scatter_add(1, flat, torch.ones_like(flat))


def metrics(routed: Routed, kept: Tensor) -> Tensor:
    """The share of the choices that each expert is given, before any is dropped; the share of the
    choices that are dropped (of `expert_choice`: of tokens without an expert); and the entropy of
    the router in nats: `[e + 2]`, means over groups. No gradient."""
    shares = routed.shares.detach()
    experts = shares.shape[-1]
    if routed.counted is None:
        load = kept.to(shares.dtype).mean(1)
        load = load / load.sum(-1, keepdim=True)
        dropped = 1 - kept.any(-1).to(shares.dtype).mean(-1)
    else:
        load = counts(routed.expert, experts).to(shares.dtype) / kept[0].numel()
        dropped = 1 - kept.to(shares.dtype).mean((1, 2))
    entropy = -torch.xlogy(shares, shares).sum(-1).mean(1) / routed.prototypes
    return torch.cat([load, dropped.unsqueeze(1), entropy.unsqueeze(1)], 1).mean(0)
