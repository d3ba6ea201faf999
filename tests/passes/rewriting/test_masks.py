"""The pass `masks`: an assignment under a mask is a choice, element by element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright import CaptureError
from meshwright.passes.rewriting import masks
from tests.equivalence import check_equal, implicit_gathers
from tests.models import real
from tests.passes.stages import check_documented, shown, stages

PLANS = {
    "data": "mesh dp=2\ndata x, i over dp\n",
    "features": "mesh dp=2, tp=2\ndata x, i over dp\ncolumns mid over tp\n",
    "sequence": "mesh dp=2, tp=2\ndata x, i over dp\nshard mid -> [b@dp, s@tp, d]\n",
}


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.scale
        h[h < 0] = 0.0
        return h.square().mean()


def test_the_docstring_shows_an_assignment_before_and_after() -> None:
    found = stages(Clipped(), (torch.randn(8, 16),), "mesh dp=2\ndata x over dp\n")
    before = shown(found["captured"], "lt", "index_put")
    check_documented(masks, before, shown(found["masks"], "lt", "where"))


class Assigned(nn.Module):
    """Every kind of value, under masks of every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(6, 4))
        self.register_buffer("known", torch.tensor([True, False, True, True]))

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = self.mid(x)
        known = self.get_buffer("known")
        made = [h.clone() for _ in range(9)]
        made[0][h < 0] = 0.0
        made[1][h < 0] = h.mean()
        made[2][i > 1] = self.w[0]
        made[3][i[:, 0] > 1] = self.w[1:5]
        made[4][:, known] = 0.5
        made[5][:, known] = h[:, 1:].cos()
        made[6] = made[6].index_put((i > 1,), self.w[0], accumulate=True)
        made[7] = made[7].index_fill(2, torch.tensor([1, 1, 3]), self.w[0, 0])
        made[8] = made[8].masked_scatter((i > 1)[..., None], self.w.sin().expand(4, 6, 4))
        table = self.w.clone()
        table[self.w < 0] = 0.1
        return torch.stack([h.sin().mean() for h in made]).sum() + table.square().sum()


@pytest.mark.parametrize("plan", PLANS)
def test_assignments_under_masks_equal_eager(plan: str) -> None:
    torch.manual_seed(0)
    check_equal(Assigned(), lambda: (real(6, 4, 4), torch.randint(0, 4, (6, 4))), PLANS[plan])


class Chosen(Assigned):
    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = self.mid(x)
        h[h < 0] = 0.0
        h[i > 1] = h.mean()
        return h.index_fill(1, i[0], 0.5).square().mean()


def test_a_mask_over_a_split_batch_gathers_nothing() -> None:
    example = (real(4, 4, 4), torch.randint(0, 4, (4, 4)))
    program = meshwright.compile(
        Chosen().double(), meshwright.Plan.parse(PLANS["data"]), example=example
    )
    assert not [each for each in implicit_gathers(program) if "x" in each.split(":")[0]]


class Rows(Assigned):
    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = self.mid(x)
        h[i > 1] = self.w[:5]
        return h.square().mean()


class Crossed(Assigned):
    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = self.mid(x)
        h[i[:, 0] > 1, torch.tensor([2])] = 0.5
        return h.square().mean()


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (Rows(), "writes one row for each true element of a mask"),
        (Crossed(), "indexes with a mask and another index at once"),
    ],
)
def test_a_count_that_the_mask_decides_is_refused(model: nn.Module, what: str) -> None:
    example = (torch.randn(6, 4, 4), torch.randint(0, 4, (6, 4)))
    with pytest.raises(CaptureError, match=what) as caught:
        meshwright.compile(model, meshwright.Plan.parse(PLANS["data"]), example=example)
    assert (
        caught.value.help
        == "write it with `torch.where(mask, value, x)`, the value as large as `x`"
    )
    assert "test_masks.py" in caught.value.culprit
