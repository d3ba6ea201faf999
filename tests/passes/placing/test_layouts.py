"""Layouts that are chosen for a whole graph at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.equivalence import check_equal, implicit_gathers
from tests.models import real


class Mask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.scale = nn.Embedding(8, 4), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(6)
        near = (place[None, :] - place[:, None]).abs()
        bias = self.bias(near).permute(2, 0, 1) * self.scale
        mask = (place[None, :] > place[:, None]).expand(x.shape[0], 4, 6, 6)
        return torch.where(mask, bias, x).square().mean()


def test_a_bias_made_of_parameters_is_made_in_parts() -> None:
    program = check_equal(
        Mask(),
        lambda: (real(8, 4, 6, 6),),
        "mesh dp=2, tp=2\ndata x over dp\nshard x [b@dp, h@tp, s, s]\n",
    )
    assert implicit_gathers(program) == []
    text = str(program.graph("stage0.forward"))
    assert "bool[8@dp, 4@tp, 6, 6]" in text


class Queries(nn.Module):
    """Learned queries, the same for every sample, that look at each."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.norm = nn.Parameter(real(3, 4)), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(x.shape[0], -1, -1)
        looks = (self.norm(queries) @ x.transpose(1, 2)).softmax(-1) @ x
        return (queries + looks).sin().sum()


def test_learned_queries_are_normed_in_parts() -> None:
    program = check_equal(Queries(), lambda: (real(8, 6, 4),), "mesh dp=2\ndata x over dp\n")
    assert implicit_gathers(program) == []
    text = str(program.graph("stage0.forward"))
    assert "(f64[8@dp, 3, 4], f64[8@dp, 3], f64[8@dp, 3])" in text


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = self.place(torch.arange(6).expand(x.shape[0], 6))
        return (x * places).sum() + places.square().sum(0).max()


def test_what_somebody_needs_whole_is_sliced_where_it_was() -> None:
    check_equal(Both(), lambda: (real(8, 6, 4),), "mesh dp=2\ndata x over dp\nallow replicate **\n")
