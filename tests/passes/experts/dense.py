"""Mixtures of experts in which every expert is applied to every token, and then masked."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from meshwright.passes.experts.mixture import Mixture


class Experts(nn.Module):
    """A feed-forward part like that of a transformer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int = 8, *, make: type[nn.Module] = Experts) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), make(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """Blocks, and a loss; in the reference, the auxiliary losses of its mixtures too."""

    def __init__(self, num_blocks: int = 2, *, make: type[nn.Module] = Experts) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Block(make=make) for _ in range(num_blocks))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(x).flatten(0, -2), labels.flatten())
        return loss + sum(m.loss for m in self.modules() if isinstance(m, Dense))


def batch(*leading: int) -> tuple[Tensor, Tensor]:
    """Rows that are alike, so that experts are not chosen evenly, and labels."""
    x = torch.randn(*leading, 8, dtype=torch.float64)
    return x + 1.5 * torch.randn(8, dtype=torch.float64), torch.randint(0, 5, leading)


def dense(model: nn.Module) -> nn.Module:
    """A copy of a compiled model whose mixtures are masked sums over all experts."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Mixture):
            module.__class__ = Dense
    return model


class Dense(Mixture):
    """The same parameters, token by token."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self._grouped(x)
        logits = tokens @ self.router.weight.T
        routes = [self.route(each) for each in logits]
        if self.router.bias is not None and self.training:
            load = sum(chosen.sum(0) for _, _, chosen, _ in routes)
            self.router.bias += self.settings.rate * (load.mean() - load).sign().float()
        kept, first, chosen, shares = (torch.stack(each) for each in zip(*routes, strict=True))
        count, size = self.settings.routing.count, tokens.shape[1]
        every = torch.stack([self.expert(e, tokens) for e in range(count)], -1)
        self.loss = self.auxiliary(first, shares) * self.settings.weight * self.training
        self.found = self.reported(kept, chosen, shares) if size else None
        return (every * kept.unsqueeze(2)).sum(-1).view_as(x)

    def expert(self, number: int, tokens: Tensor) -> Tensor:
        own = {name: p[number] for name, p in self.experts.named_parameters()}
        return functional_call(self.experts, own, (tokens,))

    def route(self, logits: Tensor) -> tuple[Tensor, ...]:
        """For one group, `[s, e]` each: the weights of what is kept, the choices that the loss
        counts, all choices, and the probabilities."""
        return getattr(self, self.settings.routing.route)(logits)

    def order(self, shares: Tensor) -> list[list[int]]:
        """The experts of each token, the best first."""
        scores = shares.detach() if self.bias is None else shares.detach() + self.bias
        return [by_size(row) for row in scores]

    @property
    def bias(self) -> Tensor | None:
        return self.router.bias

    @property
    def room(self) -> int:
        """Of one expert in one group."""
        routing = self.settings.routing
        if routing.factor is None:
            return self.size
        return math.ceil(routing.factor * routing.top * self.size / routing.count)

    def topk(self, logits: Tensor) -> tuple[Tensor, ...]:
        self.size, top = len(logits), self.settings.routing.top
        shares = logits.softmax(-1)
        order = self.order(shares)
        kept, first, chosen = (torch.zeros_like(shares) for _ in range(3))
        taken = [0] * shares.shape[1]
        for turn, token in turns(top, self.size):
            expert = order[token][turn]
            chosen[token, expert] += 1
            first[token, expert] += turn == 0
            if taken[expert] < self.room:
                total = sum(shares[token, e] for e in order[token][:top]) if top > 1 else 1
                kept[token, expert] = shares[token, expert] / total
            taken[expert] += 1
        return kept, first, chosen, shares

    switch = topk

    def prototype(self, logits: Tensor) -> tuple[Tensor, ...]:
        self.size, top = len(logits), self.settings.routing.top
        each = logits.shape[1] // top
        shares = torch.cat([part.softmax(-1) for part in logits.split(each, -1)], -1)
        kept, chosen = torch.zeros_like(shares), torch.zeros_like(shares)
        order = self.order(shares)
        taken = [0] * shares.shape[1]
        for turn, token in turns(top, self.size):
            own = range(turn * each, (turn + 1) * each)
            expert = next(e for e in order[token] if e in own)
            chosen[token, expert] += 1
            if taken[expert] < self.room:
                kept[token, expert] = shares[token, expert]
            taken[expert] += 1
        return kept, chosen, chosen, shares

    def expert_choice(self, logits: Tensor) -> tuple[Tensor, ...]:
        self.size = len(logits)
        shares = logits.softmax(-1)
        kept = torch.zeros_like(shares)
        for expert in range(shares.shape[1]):
            for token in by_size(shares[:, expert])[: self.room]:
                kept[token, expert] = shares[token, expert]
        return kept, torch.zeros_like(kept), (kept > 0).to(kept.dtype), shares

    def auxiliary(self, first: Tensor, shares: Tensor) -> Tensor:
        """E sum f P of each group and prototype, then the mean."""
        routing = self.settings.routing
        parts = routing.top if routing.route == "prototype" else 1
        f, p = first.mean(1), shares.mean(1)
        each = routing.count // parts
        losses = [
            each * (a * b).sum(-1)
            for a, b in zip(f.split(each, -1), p.split(each, -1), strict=True)
        ]
        return torch.stack(losses).mean()

    def reported(self, kept: Tensor, chosen: Tensor, shares: Tensor) -> dict[str, Tensor]:
        routing = self.settings.routing
        parts = routing.top if routing.route == "prototype" else 1
        dropped = 1 - (kept > 0).sum() / chosen.sum()
        if routing.route == "expert_choice":
            dropped = 1 - (kept > 0).any(-1).double().mean()
        return {
            "load": chosen.sum((0, 1)) / chosen.sum(),
            "dropped": dropped,
            "entropy": -(shares * shares.log()).sum(-1).mean() / parts,
        }


def by_size(row: Tensor) -> list[int]:
    """Places, the largest entry first, ties in their order."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def turns(top: int, size: int) -> Iterator[tuple[int, int]]:
    """All first choices in the order of the tokens, then the second ones."""
    return ((turn, token) for turn in range(top) for token in range(size))
