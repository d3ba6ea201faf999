"""The models that the docstrings of passes show."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


def rows() -> tuple[Tensor]:
    return (torch.randn(8, 16),)


def sequences(size: int = 16) -> tuple[Tensor]:
    return (torch.randn(8, 16, size),)


def labelled(vocab: int = 96) -> tuple[Tensor, Tensor]:
    return torch.randint(0, vocab, (8,)), torch.randint(0, vocab, (8,))
