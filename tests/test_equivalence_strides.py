"""Models whose values do not lie in memory as they are written train as they do on one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from tests.equivalence import check_equal
from tests.models import real


class Contrastive(nn.Module):
    """CLIP's loss: the same scores read by rows and by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores, labels = self.a(x) @ self.b(x).T, torch.arange(len(x))
        return F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)


class Segmented(nn.Module):
    """A class for every pixel: classes are the second dim of what a convolution gives."""

    def __init__(self, probabilities: bool = False) -> None:
        super().__init__()
        self.conv, self.probabilities = nn.Conv2d(3, 5, 3, padding=1), probabilities

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        target = F.one_hot(y, 5).movedim(-1, 1).to(x.dtype) if self.probabilities else y
        return F.cross_entropy(self.conv(x), target)


class Transposed(nn.Module):
    """Scores that a row-parallel layer gives, read by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.down(self.up(x)).T, torch.arange(8) % len(x))


class GroupNormed(nn.Module):
    """A group norm, forward and backward, of what a transpose leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 4), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x).transpose(1, 2)).square().sum(1).sin().mean()


def pixels(batch: int = 4) -> tuple[Tensor, Tensor]:
    return real(batch, 3, 4, 4), torch.randint(0, 5, (batch, 4, 4))


DATA = "data x over dp\n"
TENSOR = "columns {a,b} over tp\n"
ROWS = "columns up over tp\nrows down over tp\n"


def features(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (real(*shape, 6),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], str]] = {
    "contrastive": (Contrastive, features(8), "mesh dp=2\n" + DATA),
    "contrastive, a row a rank": (Contrastive, features(4), "mesh dp=4\n" + DATA),
    "contrastive, tensor": (Contrastive, features(8), "mesh tp=2\n" + TENSOR),
    "contrastive, both": (
        Contrastive, features(8), "mesh dp=2, tp=2\ndata x over dp\n" + TENSOR,
    ),
    "segmented": (Segmented, pixels, "mesh dp=2\ndata x, y over dp\n"),
    "segmented, an image a rank": (Segmented, pixels, "mesh dp=4\ndata x, y over dp\n"),
    "probabilities": (lambda: Segmented(True), pixels, "mesh dp=4\ndata x, y over dp\n"),
    "transposed": (Transposed, features(8), "mesh tp=2\n" + ROWS),
    "group norm": (GroupNormed, features(4, 3), "mesh dp=2\n" + DATA),
    "group norm, a row a rank": (GroupNormed, features(4, 3), "mesh dp=4\n" + DATA),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_strides_do_not_change_the_numbers(name: str) -> None:
    torch.manual_seed(0)
    model, batch, plan = CASES[name]
    check_equal(model(), batch, plan, steps=2)


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.up(x)).square().mean()

    def read(self, h: Tensor) -> Tensor:
        return h.as_strided((4, 3), (6, 2))


def test_as_strided_reads_a_contiguous_tensor_under_every_plan() -> None:
    torch.manual_seed(0)
    check_equal(Strided(), (real(8, 6),), "mesh tp=2\nshard up.weight [o, i@tp]\n")


def test_as_strided_of_a_view_is_refused_and_the_help_works() -> None:
    class Viewed(Strided):
        def read(self, h: Tensor) -> Tensor:
            return h.T.as_strided((4, 3), (6, 2))

    class Cloned(Strided):
        def read(self, h: Tensor) -> Tensor:
            return h.T.clone(memory_format=torch.contiguous_format).as_strided((4, 3), (6, 2))

    plan = "mesh tp=2\nshard up.weight [o, i@tp]\n"
    with pytest.raises(meshwright.CaptureError, match="`as_strided` is called on a view"):
        check_equal(Viewed(), (real(8, 6),), plan)
    torch.manual_seed(0)
    check_equal(Cloned(), (real(8, 6),), plan)
