"""Values that share memory, or a name, with another keep their own value."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.equivalence import check_equal

CLASSES, ROWS, FEATURES = 12, 8, 4
DATA = "mesh dp=2\ndata x, targets over dp"


def batch() -> dict[str, Tensor]:
    return {
        "x": torch.randn(ROWS, FEATURES, dtype=torch.float64),
        "targets": torch.randint(0, CLASSES, (ROWS,)),
    }


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(2, ROWS, CLASSES))

    def forward(self, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits[1], targets)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("now", torch.zeros(3))
        self.register_buffer("before", torch.ones(3))

    def forward(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        seen, then = self.now.clone(), self.before.clone()
        self.now.copy_(then)
        self.before.copy_(seen)
        return {"loss": F.cross_entropy(self.head(x), targets), "seen": seen}


def test_the_gradient_of_a_loss_is_not_written_over_logits_that_are_a_parameter() -> None:
    torch.manual_seed(0)
    plan = "mesh dp=2\nallow replicate **"
    check_equal(Table(), lambda: {"targets": batch()["targets"]}, plan)


def test_a_loss_that_is_also_an_output_is_waited_for_once() -> None:
    torch.manual_seed(0)
    check_equal(Head(), batch, DATA, outputs=["loss"])


def test_buffers_that_change_places_keep_their_values_and_so_do_outputs() -> None:
    torch.manual_seed(0)
    check_equal(Head(), batch, DATA, outputs=["seen"])
