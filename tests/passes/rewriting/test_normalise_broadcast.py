"""Values that an operator broadcasts keep their layouts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.linear(x), y)


def test_mse_loss_under_data_reduces_only_the_loss_and_the_gradients() -> None:
    plan = mw.Plan.parse("mesh dp=2\ndata x, y over dp\n")
    program = mw.compile(Model(), plan, (torch.zeros(4, 8), torch.zeros(4, 8)))
    assert program.comm().counts() == {"all_reduce[dp]": 2}


def test_l1_loss_against_a_smaller_target_equals_the_model() -> None:
    class Absolute(Model):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            wide, target = torch.broadcast_tensors(self.linear(x), y)
            return (wide - target).abs().sum()

    model, x, y = Absolute().double(), torch.randn(4, 8).double(), torch.randn(8).double()
    program = mw.compile(model, mw.Plan.parse("mesh dp=2\ndata x over dp\n"), (x, y))
    assert not [m for m in program.movements if m.implicit]
    run = program.launch()
    torch.testing.assert_close(run.step(x, y), model(x, y))
