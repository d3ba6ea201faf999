"""Values of tensors in Python: checks that only raise, known masks, static inputs, what is said."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.capture.capture import capture
from meshwright.compiler.errors import CaptureError
from tests.compiler.interpreter import check_equal_to_eager
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


def checked_at_the_end(model: Values, h: Tensor) -> Tensor:
    try:
        if model.text:
            return h
        h = h * 2
    finally:
        if bool((h > 1e9).any()) and not (h < 1e9).all():
            raise ValueError("too large")
    return h


def masked(model: Values, h: Tensor) -> Tensor:
    return h[:, model.mask] * 2 + h[..., model.mask].pow(2)


@pytest.mark.parametrize("then", [checked, checked_at_the_end])
def test_a_check_that_only_raises_is_passed_over(then: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal_to_eager(Values(then), (torch.randn(5, 4).double(),))


def suppressed(model: Values, h: Tensor) -> Tensor:
    with contextlib.suppress(ValueError):
        if h.sum() < 1000:
            raise ValueError("small")
        h = h * 2
    return h


def caught_in_a_group(model: Values, h: Tensor) -> Tensor:
    try:
        if h.sum() < 1000:
            raise ValueError("small")
    except* ValueError:
        h = h * 2
    return h


@pytest.mark.parametrize("then", [suppressed, caught_in_a_group])
def test_a_check_whose_error_is_caught_decides(then: Any) -> None:
    with pytest.raises(CaptureError, match="decides by the value of a tensor"):
        capture(Values(then), (torch.randn(5, 4).double(),))


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
            capture(model, (x,))
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
    with pytest.raises(meshwright.RunError, match="`grid` is static and differs"):
        run.step(x, other)
    for each in (other, grid):
        torch.testing.assert_close(run.evaluate(x, each), model(x, each).detach())


@pytest.mark.parametrize("static", [["gird"], "grid"])
def test_a_mistake_in_static_is_an_error(static: Any) -> None:
    with pytest.raises(CaptureError, match="`static`"):
        meshwright.compile(Grid(), PLAN, (torch.randn(4, 6, 4), torch.ones(2, 2)), static=static)


def literal_masks(model: Values, h: Tensor) -> Tensor:
    mask = torch.tensor([True, False, True, True])
    even = torch.arange(h.shape[1], device=h.device) % 2 == 0
    even[1:].logical_not_()
    square = torch.ones_like(h[0, :, None] * h[0], dtype=torch.bool).triu(1)
    h = h.clone()
    h[:, mask] = h[:, mask].exp()
    h[:, ~even & model.mask] += 1
    pairs = h[..., None] * h[:, None]
    return pairs[:, square] * int(mask.sum()) + pairs.masked_select(square).view(-1, 6)


def literal_places(model: Values, h: Tensor) -> Tensor:
    mask = h.new_ones(4, dtype=torch.bool)
    mask[2] = False
    (where,) = torch.where(mask)
    total = h[:, mask.nonzero()[:, 0]] * h[:, where] if mask.any() else h
    for place in torch.tensor([0, 2]):
        total = total + h[:, place : place + 1]
    return total


@pytest.mark.parametrize("then", [literal_masks, literal_places])
def test_what_follows_from_literals_is_known(then: Any) -> None:
    check_equal(Values(then), lambda: (torch.randn(6, 4).double(),), DATA)


def written(model: Values, h: Tensor) -> Tensor:
    mask = torch.zeros(4, dtype=torch.bool)
    mask[1:].copy_(h.mean(0)[1:] > 0)
    mask[0] = True
    return h[:, mask]


def drawn(model: Values, h: Tensor) -> Tensor:
    return h[:, torch.zeros(4).bernoulli_(0.5) > 0]


def of_its_own(model: Values, h: Tensor) -> Tensor:
    level = h.mean()
    return h[:, torch.full_like(level, level.item()).expand(4) > 0]


@pytest.mark.parametrize("then", [written, drawn, of_its_own])
def test_a_mask_that_differs_from_step_to_step_is_refused(then: Any) -> None:
    with pytest.raises(CaptureError, match=r"depend|turns the values|as long as the mask"):
        capture(Values(then), (torch.randn(6, 4).double(),))


def test_a_buffer_is_no_known_mask() -> None:
    model = Values(lambda model, h: h[:, model.get_buffer("kept")])
    mask = model.mask
    model.register_buffer("kept", mask)
    with pytest.raises(CaptureError, match="as long as the mask") as error:
        capture(model, (torch.randn(6, 4).double(),))
    assert "as a plain attribute, not a buffer" in str(error.value)
    del model.kept
    model.register_buffer("kept", mask.nonzero()[:, 0])
    check_equal(model, lambda: (torch.randn(6, 4).double(),), DATA)


def test_an_embedding_with_a_largest_norm_is_told_another_way() -> None:
    table = nn.Embedding(5, 4, max_norm=1.0).double()
    model = Values(lambda model, h: h + table(torch.arange(4)))
    model.table = table
    with pytest.raises(CaptureError, match="leave out `max_norm`"):
        capture(model, (torch.randn(4, 4).double(),))
