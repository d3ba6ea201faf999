"""A capture in one thread leaves what other threads do as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import meshwright as mw
from meshwright.compiler.capture.tracing.patches import replaced


class Doubled(torch.autograd.Function):
    """Its backward is wrong on purpose, so that a gradient tells whether it ran."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty()
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


def trained(wanted: Callable[[int], bool]) -> list[float]:
    """Losses and gradients of a training that does all that a capture replaces or refuses."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    norm = nn.BatchNorm1d(8, momentum=None).double()
    found: list[float] = []
    seen: list[float] = []
    step = 0
    while wanted(step):
        x = torch.empty(4, 8, dtype=torch.float64).random_(0, 5, generator=generator)
        hidden = Doubled.apply(norm(x) @ weight)
        hidden.register_hook(lambda grad: seen.append(grad.sum().item()))
        with torch.inference_mode():
            torch.equal(x, x) and torch.allclose(x, x)
        with torch.autocast("cpu", enabled=True):
            assert (x.float() @ x.float().T).dtype is torch.bfloat16
        loss = hidden.square().mean()
        (slope,) = torch.autograd.grad(loss, weight, retain_graph=True)
        loss.backward()
        assert weight.grad is not None
        weight.data -= 1e-2 * weight.grad
        weight.data = weight.data.clone()
        weight.grad = None
        pack_padded_sequence(x[None], torch.tensor([4]), batch_first=True)
        picked = x.masked_select(x > 2).sum()
        shown = f"{loss:.3f}"
        found += [loss.item(), float(slope.sum()), float(picked), float(shown), *seen]
        found.append(float(torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(1.0))))
        assert torch.is_nonzero(loss) == bool(loss)
        seen.clear()
        step += 1
    return found


class Captured(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).data + self.up(x)
        with torch.inference_mode():
            scale = x.mean()
        return self.down(hidden * scale).square().mean()


def compiled(width: int = 8) -> mw.Program:
    plan = mw.Plan.parse("mesh tp=2\ncolumns up over tp\nrows down over tp\n")
    return mw.compile(Captured(width), plan, (torch.ones(4, 8),))


class InThread:
    """A call in a thread of its own; `result` waits, and raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._error = call, None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join(120)
        if self._error is not None:
            raise self._error
        return self._value


def test_another_thread_trains_as_it_does_alone_while_models_are_captured() -> None:
    ended = threading.Event()
    steps: list[int] = []

    def until_ended(step: int) -> bool:
        steps.append(step)
        return not ended.is_set()

    training = InThread(lambda: trained(until_ended))
    try:
        for _ in range(30):
            compiled()
            # A busy machine may give the other thread little of its time.
            if len(steps) > 10:
                break
    finally:
        ended.set()
    found = training.result()
    assert len(steps) > 10
    assert found == trained(lambda step: step < len(steps) - 1)


def test_captures_in_several_threads_wait_for_each_other() -> None:
    captures = [InThread(lambda width=width: compiled(width)) for width in (4, 8, 12)]
    programs = [capture.result() for capture in captures]
    for width, program in zip((4, 8, 12), programs, strict=True):
        assert program.digest == compiled(width).digest


def test_random_numbers_that_another_thread_draws_are_not_drawn_again() -> None:
    ended, drawn = threading.Event(), []

    def draw() -> None:
        while not ended.is_set():
            drawn.append(torch.rand(()).item())
            threading.Event().wait(0.001)

    drawing = InThread(draw)
    try:
        compiled()
    finally:
        ended.set()
    drawing.result()
    drawn.extend(torch.rand(()).item() for _ in range(len(drawn)))
    assert len(set(drawn)) > 0.99 * len(drawn)


@pytest.mark.parametrize("owner", [torch, nn.Module, Tensor])
def test_a_replaced_attribute_is_another_in_this_thread_alone(owner: Any) -> None:
    name = {torch: "allclose", nn.Module: "eval", Tensor: "detach"}[owner]
    original = getattr(owner, name)
    inherited = name not in vars(owner)
    with replaced(owner, name, lambda *args: "replaced"):
        subject = nn.Linear(1, 1) if owner is nn.Module else torch.ones(1)
        call = lambda: getattr(owner, name)(*[subject] * (2 if owner is torch else 1))  # noqa: E731
        assert call() == "replaced"
        assert InThread(call).result() != "replaced"
    assert getattr(owner, name) == original
    assert (name not in vars(owner)) == inherited
