"""The models that the docstrings of passes show."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

grouped_mm = torch.ops.transformers.grouped_mm_fallback
"""Takes float64, which torch's own does not."""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x))).sum()


class Lm(nn.Module):
    def __init__(self, vocab: int = 96) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(vocab, 16), nn.Linear(16, vocab, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.wte(tokens)), targets)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Body()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).sum()


class Places(nn.Module):
    """A position embedding, repeated for every row or broadcast."""

    def __init__(self, repeated: bool) -> None:
        super().__init__()
        self.wpe, self.repeated = nn.Embedding(16, 64), repeated

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(16)
        if self.repeated:
            ids = ids.expand(x.shape[0], 16)
        return (x * self.wpe(ids)).sum()


class Routed(nn.Module):
    """Each row goes to two of four experts, which see their rows one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.scale = nn.Linear(16, 4), nn.Parameter(torch.rand(8))
        self.up, self.down = (
            nn.Parameter(torch.randn(4, 16, 8)),
            nn.Parameter(torch.randn(4, 8, 16)),
        )

    def routed(self, x: Tensor) -> Tensor:
        share, ids = self.gate(x).softmax(-1).topk(2)
        order = ids.flatten().argsort()
        ends = torch.histc(ids.flatten().to(x.dtype), 4, 0, 3).cumsum(0).int()
        h = F.silu(grouped_mm(x[order // 2], self.up, ends)) * self.scale
        y = grouped_mm(h, self.down, ends) * share.flatten()[order].unsqueeze(1)
        return y[order.argsort()].view(*ids.shape, 16).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x).square().mean()


def rows() -> tuple[Tensor]:
    return (torch.randn(8, 16),)


def sequences(size: int = 16) -> tuple[Tensor]:
    return (torch.randn(8, 16, size),)


def labelled(vocab: int = 96) -> tuple[Tensor, Tensor]:
    return torch.randint(0, vocab, (8,)), torch.randint(0, vocab, (8,))
