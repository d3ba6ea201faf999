"""The operations of a graph are those that torch counts when the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import meshwright
from meshwright.compiler.graph.flops import flops


def counted(model: nn.Module, example: tuple[Any, ...], plan: str = "mesh dp=1\n") -> int:
    program = meshwright.compile(model, meshwright.Plan.parse(plan), example=example)
    graphs = program.graphs().values()
    return sum(flops(node, graph.mesh) for graph in graphs for node in graph.nodes)


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane = nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(3, 4, 3, groups=1)
        self.wider = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.up, self.vector = nn.Linear(8, 12), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        rows = self.up(self.line(x))  # [2, 6, 12]
        mixed = torch.einsum("b i d, b j d -> b i j", rows, rows) @ rows
        mixed = torch.bmm(mixed, rows.transpose(1, 2)).sum() + (rows @ self.vector).sum()
        return mixed + self.wider(self.plane(image)).square().sum()


def test_products_and_convolutions_count_as_in_torch() -> None:
    model, example = Products(), (torch.randn(2, 4, 8), torch.randn(2, 3, 6, 6))
    with FlopCounterMode(display=False) as counter:
        model(*example).backward()
    vectors = 2 * 2 * (2 * 6 * 12)  # `rows @ vector` and a gradient of it, which torch leaves out
    assert counted(model, example) == counter.get_total_flops() + vectors


class Attending(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.scale = groups, nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        k = k[:, : self.groups]
        return F.scaled_dot_product_attention(
            q * self.scale, k * self.scale, k * self.scale, enable_gqa=self.groups < 4
        ).sum()


@pytest.mark.parametrize("groups", [4, 2])
def test_attention_multiplies_twice_forward_and_five_times_backward(groups: int) -> None:
    example = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 10, 8)
    assert counted(Attending(groups), example) == (2 + 5) * 2 * (2 * 4 * 6 * 10 * 8)


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().sum()


def test_a_rank_counts_its_own_part() -> None:
    plan = "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\nrows down over tp\n"
    model, example = Split(), (torch.randn(4, 8),)
    assert 4 * counted(model, example, plan) == counted(model, example)
