"""A model that has experts of its own, as Hugging Face writes them: matrices stacked by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.examples import grouped_mm

Body = Callable[["Stacked", Tensor, Tensor, Tensor], Tensor]


class Stacked(nn.Module):
    """Four experts of two matrices with biases. `body` is what is done with sorted rows, given
    where each expert's end and the expert of each."""

    def __init__(self, body: Body, count: int = 4) -> None:
        super().__init__()
        self.body = body
        self.up, self.down = real(count, 8, 16), real(count, 16, 8)
        self.up_bias, self.down_bias, self.scale = real(count, 16), real(count, 8), real(16)

    def forward(self, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        ends = torch.histc(ids.flatten().to(x.dtype), len(self.up), 0, len(self.up) - 1).cumsum(0)
        rows = x[order // ids.shape[1]]
        y = self.body(self, rows, ends.int(), ids.flatten()[order])
        y = y * share.flatten()[order].unsqueeze(1)
        return y[order.argsort()].view(*ids.shape, -1).sum(1)


def real(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64) / 2)


def plain(m: Stacked, x: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    return grouped_mm(F.silu(grouped_mm(x, m.up, ends)) * m.scale, m.down, ends)


def biased(m: Stacked, x: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    bias = m.up_bias[ids]
    h = (grouped_mm(x, m.up, ends) + bias).relu()
    return grouped_mm(h, m.down, ends) + m.down_bias[ids]


def gated(m: Stacked, x: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    """Biases that are added to what is a part of features, and an input that is used again."""
    gate, up = (grouped_mm(x, m.up, ends) + m.up_bias[ids]).chunk(2, -1)
    h = torch.cat([gate.sigmoid() * up, grouped_mm(x, m.up, ends).tanh()[:, 8:]], -1)
    return grouped_mm(h.view(-1, 4, 4).softmax(-1).flatten(1), m.down, ends)


def mixing(m: Stacked, x: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    """Between the products, rows are compared with all others."""
    h = grouped_mm(x, m.up, ends)
    return grouped_mm(h - h.mean(), m.down, ends)


def widened(m: Stacked, x: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    """Between the products, an operator that is told how many rows there are."""
    h = grouped_mm(x, m.up, ends).unsqueeze(2).expand(len(x), 16, 2)
    return grouped_mm(h.square().sum(2), m.down, ends)


def coded(m: Stacked, x: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    """Between the products, rows of a table that has more than experts."""
    return grouped_mm(grouped_mm(x, m.up, ends) * m.codes[ids], m.down, ends)


def dropped(m: Stacked, x: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    """Between the products, random numbers."""
    return grouped_mm(F.dropout(grouped_mm(x, m.up, ends), 0.5, m.training), m.down, ends)


class Block(nn.Module):
    def __init__(self, body: Body, top: int, count: int) -> None:
        super().__init__()
        self.router, self.experts, self.top = nn.Linear(8, count), Stacked(body, count), top

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        share, ids = self.router(rows).softmax(-1).topk(self.top)
        return x + self.experts(rows, share, ids).view_as(x)


class Model(nn.Module):
    def __init__(
        self, num_blocks: int = 1, *, body: Body = plain, top: int = 2, count: int = 4
    ) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Block(body, top, count) for _ in range(num_blocks))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, -2), labels.flatten())


def skewed(expert: int) -> Model:
    """A model that sends all rows to one expert."""
    torch.manual_seed(0)
    model = Model(top=1)
    for block in model.blocks:
        block.router.weight.data.zero_()
        block.router.bias.data = torch.eye(4)[expert]
    return model
