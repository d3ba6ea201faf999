"""Models train in float32 and bfloat16 too: torch picks other operators for some types."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from tests.equivalence import Comparison, Update, check_equal

SGD: Update = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Recurrent(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.mid, self.out = inner, nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h, _ = self.inner(x)
        return F.cross_entropy(self.out(torch.tanh(self.mid(h)).mean(1)), y)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(6, 16, 2, batch_first=True),
    "lstm of two directions": lambda: nn.LSTM(6, 8, batch_first=True, bidirectional=True),
    "gru": lambda: nn.GRU(6, 16, batch_first=True),
    "rnn": lambda: nn.RNN(6, 16, batch_first=True),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", NETWORKS)
def test_recurrent_networks_train_in_any_type(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check_equal(
        Recurrent(NETWORKS[name]()),
        lambda: (torch.randn(6, 4, 6, dtype=dtype), torch.randint(0, 5, (6,))),
        "mesh dp=2, tp=2\ndata x, y over dp\ncolumns mid over tp\nrows out over tp\n",
        dtype=dtype,
        tolerance=TOLERANCES[dtype],
        update=SGD,
        steps=2,
    )


class Normed(nn.Module):
    """Layers in bfloat16 around a norm in float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), norm, nn.Linear(16, 4)
        self.bfloat16()
        norm.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x.bfloat16()))).float().square().mean()


@pytest.mark.parametrize(
    ("norm", "plan"),
    [
        (lambda: nn.BatchNorm1d(16), "mesh dp=2\ndata x over dp\n"),
        (lambda: nn.GroupNorm(2, 16), "mesh tp=2\ncolumns up over tp\nrows down over tp\n"),
    ],
)
def test_a_split_norm_keeps_the_type_of_its_activations(
    norm: Callable[[], nn.Module], plan: str
) -> None:
    torch.manual_seed(0)
    model, x = Normed(norm()), torch.randn(8, 8)
    reference = copy.deepcopy(model)
    run = meshwright.compile(model, meshwright.Plan.parse(plan), example=(x,)).launch()
    compare = Comparison(TOLERANCES[torch.bfloat16])
    loss = reference(x)
    loss.backward()
    compare("loss", run.step(x), loss)
    compare.gradients(run.gradients(), reference, "the first step")
    compare.report()
