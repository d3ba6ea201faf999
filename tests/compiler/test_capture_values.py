"""Values of tensors in Python: checks that only raise, known masks, static inputs, what is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.capture import capture
from meshwright.compiler.errors import CaptureError
from tests.compiler.interpreter import MESH, check_equal_to_eager
from tests.equivalence import check_equal

DATA = "mesh dp=2\ndata x over dp\n"
PLAN = meshwright.Plan.parse(DATA)


SAID = ["`print`", "`item`", "formatting", "the"]


class Values(nn.Module):
    def __init__(self, then: Callable[[Values, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.then = nn.Linear(4, 4).double(), then
        self.norm = nn.BatchNorm1d(4, momentum=None, affine=False).double()
        self.mask = torch.tensor([True, False, True, True])
        self.seen: list[float] = []
        self.text, self.calls = "", 0

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.a(x)).sum()


def checked(model: Values, h: Tensor) -> Tensor:
    if h.max() > 1000:
        raise ValueError("too large")
    if not bool((h < 1e9).all()) or h.shape[0] < 1:
        text = "too large"
        raise ValueError(text)
    if h.shape[0] < 1 or not (h < 1e9).all():
        raise ValueError("too large")
    if h.sum().item() > 1e9 or torch.equal(h, h + 1):
        raise ValueError("too large")
    assert not torch.isnan(h).any(), "not a number"
    assert (h < 1e9).all() and not (h > 1e9).any(), "too large"
    return h.pow(2) + F.gaussian_nll_loss(h, h * 0, h.pow(2) + 1)


def masked(model: Values, h: Tensor) -> Tensor:
    return h[:, model.mask] * 2 + h[..., model.mask].pow(2)


def test_a_check_that_only_raises_is_passed_over() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal_to_eager(Values(checked), (torch.randn(5, 4).double(),))


def test_a_known_mask_picks_known_places() -> None:
    check_equal(Values(masked), lambda: (torch.randn(6, 4).double(),), DATA)


def test_a_batch_norm_without_momentum_averages_over_all_batches() -> None:
    model = Values(lambda model, h: model.norm(h).pow(3))
    model.a.bias.requires_grad_(False)
    check_equal(model, lambda: (torch.randn(8, 4).double(),), DATA, tolerance=1e-9)


def test_what_runs_only_at_capture_is_said_once_a_line() -> None:
    def told(model: Values, h: Tensor) -> Tensor:
        for row in h:
            print(row.shape)
            model.seen.append(row.sum().item())
            model.text = f"{row.sum():.3f}"
        model.calls += 1
        return h

    model, x = Values(told), torch.randn(3, 4).double()
    for given in (4, 0):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            capture(model, (x,), MESH)
        assert len(found) == given
        assert all(each.filename == __file__ for each in found)
        assert [str(each.message).split()[0] for each in found] == SAID[:given]


class Grid(nn.Module):
    """Cuts its input at places that it reads from a tensor, as Qwen2-VL does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4).double()

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        parts = self.a(x).split((grid.prod(-1) // 2).tolist(), 1)
        places = [torch.arange(int(width)) for _, width in grid]
        places.append(torch.repeat_interleave(grid[:, 0], grid[:, 1]))
        total = torch.cat(places).sum()
        return sum((part.mean() * total for part in parts), torch.zeros(()).double())


def test_a_static_input_is_part_of_the_program() -> None:
    model, x, grid = Grid(), torch.randn(4, 6, 4).double(), torch.tensor([[2, 2], [1, 8]])
    with pytest.raises(CaptureError, match="decides by the value"):
        meshwright.compile(model, PLAN, (x, grid))
    run = meshwright.compile(model, PLAN, (x, grid), static=["grid"]).launch()
    torch.testing.assert_close(run.step(x, grid), model(x, grid).detach())
    other = torch.tensor([[1, 4], [2, 4]])
    with pytest.raises(meshwright.RunError, match="`grid` is static and has another value"):
        run.step(x, other)
    for each in (other, grid):
        torch.testing.assert_close(run.evaluate(x, each), model(x, each).detach())


@pytest.mark.parametrize("static", [["gird"], "grid"])
def test_a_mistake_in_static_is_an_error(static: Any) -> None:
    with pytest.raises(CaptureError, match="`static`"):
        meshwright.compile(Grid(), PLAN, (torch.randn(4, 6, 4), torch.ones(2, 2)), static=static)
