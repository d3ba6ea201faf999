"""Programs whose large products are oneDNN's: equal to eager, and in memory that is predicted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meshwright.compiler.kernels import products
from tests.compiler.report.memory.test_peaks import check
from tests.equivalence import check_equal


class Layers(nn.Module):
    """A linear, a product that adds a bias, one without, and one of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 256)
        self.down = nn.Parameter(torch.randn(256, 128) / 16)
        self.bias = nn.Parameter(torch.randn(128))
        self.mix = nn.Parameter(torch.randn(128, 128) / 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x)).flatten(0, 1)
        found = torch.addmm(self.bias, hidden, self.down).view(x.shape)
        return (found @ self.mix).square().mean()


PLANS = ["mesh dp=1", "mesh dp=2\ndata x over dp\naccumulate 2\n"]
X = torch.randn(16, 32, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_large_products_equal_eager(
    plan: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "is_faster", lambda _: faster)
    torch.manual_seed(0)
    program = check_equal(Layers(), (X,), plan, dtype=torch.float32, tolerance=1e-5)
    source = "".join(code.source for code in program.code)
    for name in ("_large_linear", "_large_matmul", "_large_addmm", "_large_mm"):
        assert name in source


class Experts(nn.Module):
    """A product for each of four matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Parameter(torch.randn(4, 128, 256) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.view(4, 128, 128), self.each).square().mean()


@pytest.mark.parametrize("faster", [True, False])
def test_large_products_of_many_matrices_equal_eager(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "is_faster", lambda _: faster)
    torch.manual_seed(0)
    program = check_equal(Experts(), (X,), "mesh dp=1", dtype=torch.float32, tolerance=1e-5)
    assert "".join(code.source for code in program.code).count("_large_bmm") == 2


@pytest.mark.parametrize("plan", PLANS)
def test_their_memory_is_the_one_that_is_measured(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "is_faster", lambda _: True)
    check(Layers(), plan, (X,))
