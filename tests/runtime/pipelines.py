"""Models of which each half is a stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Deep(nn.Module):
    """Eight layers, all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x.square().mean()


class Looked(Deep):
    """The same, and at the end a row of a table for each row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 16)
        self.double()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = F.gelu(layer(x))
        return (x * self.table(ids)).square().mean()


PLAN = "mesh pp=2\ndata x, ids\nstages at layers.4 over pp microbatches=4\n"
"""One for `Looked`."""


def batch() -> tuple[Tensor, Tensor]:
    """Eight rows of 16, and eight numbers below 5."""
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, generator=seed, dtype=torch.float64)
    return x, torch.randint(0, 5, (8,), generator=seed)
