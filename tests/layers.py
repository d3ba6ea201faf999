"""A model of equal layers, and what it is in eager mode where layers share parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, ROWS = 8, 8
TENSOR = "columns blocks.*.up over tp\nrows blocks.*.down over tp\n"
SHARING = {
    "alone": "mesh one=1\nshare blocks.*\n",
    "zero 1": "mesh dp=4\ndata x over dp\nzero 1 over dp\nshare blocks.* group=2\n",
    "zero 2": "mesh dp=2\ndata x over dp\nzero 2 over dp\naccumulate 2\ncheckpoint blocks.*\n"
    "offload parameters blocks.*\nshare blocks.* every=2\n",
    "zero 3": f"mesh dp=2, tp=2\ndata x over dp\n{TENSOR}zero 3 over dp\n"
    "share blocks.* except=[ln]\n",
    "stages": "mesh dp=2, pp=2\ndata x over dp\nzero 1 over dp\n"
    "stages at blocks.2 over pp microbatches=2\nshare blocks.*\n",
}
"""Plans of many kinds under which layers share parameters."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.ln(x))))


class Deep(nn.Module):
    """Equal layers with different values."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(layers)
        self.blocks = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(D, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def batch(seed: int = 0) -> tuple[Tensor]:
    """A batch of `Deep`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(ROWS, D, generator=generator, dtype=torch.float64),)


def tied(model: nn.Module, aliases: Mapping[str, str]) -> nn.Module:
    """A copy of `model` in which the parameters of these names are one."""
    found = copy.deepcopy(model)
    for alias, name in aliases.items():
        path, _, leaf = alias.rpartition(".")
        setattr(found.get_submodule(path), leaf, found.get_parameter(name))
    return found
