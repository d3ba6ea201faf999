"""What autograd would do survives capture: stops, frozen halves, writes, running statistics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from meshwright.compiler.capture.capture import capture
from tests.compiler.interpreter import check_equal_to_eager, output_labels

aten = torch.ops.aten
D = 4


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("average", torch.zeros(D))


class NoGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            k = self.b(h) * 2
        return (h * k).sum()


class Nested(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            k = h * 2
            with torch.enable_grad():
                m = self.b(k) + h * h
                with torch.no_grad():
                    q = m * 3
            r = m * k
        return (h * r + m * q).sum()


class ViewsUnderNoGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            same, row, (left, _), top = h, h[0], h.split(2, 1), h.max(0).values
        return (same * row).sum() + (left * h[:, :2]).sum() + (top * self.b(h)).sum()


class Teacher(Two):
    @torch.no_grad()
    def first(self, x: Tensor) -> Tensor:
        return self.b(x)

    @torch.inference_mode()
    def second(self, x: Tensor) -> Tensor:
        return self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) * self.first(x)).sum() + (self.a(x) + self.second(x)).sum()


class Switched(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        torch.set_grad_enabled(False)
        k = h * 2
        torch.set_grad_enabled(True)
        return (h * k).sum()


class Detached(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return (h * self.b(h.detach())).sum() + (h * h.data).sum()


class NoGradInsideAutocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            k = h * 2
        return (h * k).sum()


class InPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, :2].mul_(3)
        h.add_(1)
        out = torch.zeros(5, 2 * D)
        out[:, :D] = self.b(h)
        out[:, D:] = h * h
        out[0] += h.sum()
        return out.pow(2).sum()


class InPlaceUnderNoGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            k = h * 2
            k.clamp_(min=0)
            k[0] = 1
        return (h * k).sum()


class AliasOfDetached(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        seen = h.detach()
        h.mul_(2)
        return (self.b(h) * seen).sum()


class Masked(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[x > 0] = 0.0
        return self.b(h).sum()


class MovingAverage(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return (self.b(h) * self.average).sum()


class AssignedAverage(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.average = self.average * 0.9 + h.detach().mean(0)
        return (self.b(h) * self.average).sum()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = AssignedAverage()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.b, F.gelu(self.a(x)), use_reentrant=False).sum()


class CalledTwice(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(F.gelu(self.a(x))).sum()


class Constants(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) * self.scale + torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()


class LazyMask(Two):
    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(D)
        return (self.a(x) * self.mask).sum()


class Dropout(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 2
        F.dropout(h, 0.3, self.training, inplace=True)
        return F.dropout(self.b(h), 0.3, self.training).sum()


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).pow(2).sum()


class WritesIntoZeros(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        halves, total, kept = torch.zeros_like(h), torch.zeros_like(h[:, 0]), torch.full_like(h, 2)
        before = (halves[0].clone() * h).sum()
        halves[:, :2] = h[:, 2:]
        for column in range(D):
            total += h[:, column] * column
        kept[torch.tensor([0, 2]), torch.tensor([1, 3])] = h[0, :2]
        kept[h > 0] = 0.0
        nodes = h.new_zeros(3, D).index_add_(0, torch.tensor([0, 1, 2, 0, 1]), h)
        return before + (halves * h).sum() + total.pow(2).sum() + kept.pow(2).sum() + nodes.sum()


class WritesThroughViewsOfZeros(Two):
    def forward(self, x: Tensor) -> Tensor:
        h, o, c = self.a(x), torch.zeros(5, D), torch.zeros(5, 2, dtype=torch.complex128)
        row, early = o[0], o[1].view(2, 2)
        o.narrow(1, 0, 2).copy_(h[:, :2])
        o.t()[3].copy_(h[:, 3])
        o.view(-1)[3:5].add_(h[0, :2])
        o.diagonal().mul_(h[1])
        torch.view_as_real(c)[..., 0] = h[:, :2]
        c.imag[:] = h[:, 2:]
        return (o.pow(2).sum() + (row * h[3]).sum()) * early.sum() + c.abs().pow(2).sum()


class WritesIntoDetached(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        hot = F.one_hot(h.argmax(-1), D).to(h.dtype)
        apart, cleared, written = h.detach().clone(), h.clone().detach(), h.sin().detach()
        early = (hot.clone() * h).sum() + (apart.clone() * h).sum()
        hot -= h.softmax(-1)
        apart[:, 0] = h[:, 1]
        cleared[:, 0] = 0
        written[0] += h[1]
        gone = h * 2
        seen = gone.sum()
        gone.detach_()
        gone += h
        return early + seen + sum(((h + o) * o).sum() for o in (hot, apart, cleared, written, gone))


class WritesUnderNoGradAndLater(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        o, late = torch.zeros_like(h), h * 2
        with torch.no_grad():
            k, (top, _) = h * 2, h.max(1)
            o[0] = h[0]
            with torch.enable_grad():
                o[1] = h[1]
            late.clamp_(min=0)
        early = (k.clone() * h).sum() + (o.clone() * h).sum() + (late.detach() * h).sum()
        k[:, 1] *= h[:, 0]
        top += h[:, 0]
        o[2] = h[2]
        both = torch.cat([k, o])
        k += h
        return early + both.pow(2).sum() + k.pow(2).sum() + top.pow(2).sum()


class WritesIntoBuffersThroughDetached(Two):
    def forward(self, x: Tensor) -> Tensor:
        h, zeros = self.a(x), torch.zeros(D)
        self.average.data.mul_(0.9).add_(h.mean(0).detach())
        seen = zeros.detach()
        seen[0] = 1.0
        zeros[1] = 2.0
        return (self.b(h) * self.average.detach().add_(1)).sum() + (h * zeros * seen).sum()


MODELS = [
    NoGrad,
    Nested,
    ViewsUnderNoGrad,
    Teacher,
    Switched,
    Detached,
    NoGradInsideAutocast,
    InPlace,
    InPlaceUnderNoGrad,
    AliasOfDetached,
    Masked,
    MovingAverage,
    AssignedAverage,
    Inner,
    Checkpointed,
    CalledTwice,
    Constants,
    LazyMask,
    Dropout,
    Spectral,
    WritesIntoZeros,
    WritesThroughViewsOfZeros,
    WritesIntoDetached,
    WritesUnderNoGradAndLater,
    WritesIntoBuffersThroughDetached,
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_graph_has_the_values_the_gradients_and_the_buffers_of_eager_mode(
    model: type[nn.Module],
) -> None:
    captured = check_equal_to_eager(model(), (torch.randn(5, D),))
    assert not any(
        isinstance(node.op, torch._ops.OpOverload) and node.op._schema.is_mutable
        for node in captured.graph.nodes
    )


def test_running_statistics_are_outputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    captured = check_equal_to_eager(model, (torch.randn(2, 3, 6, 6),), loss=lambda y: y.sum())
    assert output_labels(captured) == (
        "loss",
        "buffer:1.running_mean",
        "buffer:1.running_var",
        "buffer:1.num_batches_tracked",
    )


def test_a_frozen_half_is_not_differentiated() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
    model[0].requires_grad_(False)
    captured = check_equal_to_eager(model, (torch.randn(5, D),), loss=lambda y: y.sum())
    assert captured.frozen == {"0.weight", "0.bias"}
    wanted = {node.name: node.requires_grad for node in captured.graph.nodes}
    assert not wanted["linear"]
    assert wanted["linear_1"]
    assert not wanted["_0_weight"]
    assert wanted["_1_weight"]


def test_gradients_stop_where_nothing_differentiable_is_left() -> None:
    class Ranks(Two):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            order = h.argsort(1)
            return (h.gather(1, order) * (h > 0) * torch.zeros_like(h)).sum()

    captured = check_equal_to_eager(Ranks(), (torch.randn(5, D),))
    stopped = {node.op for node in captured.graph.nodes if not node.requires_grad}
    assert {aten.gt.Scalar, aten.zeros_like.default} <= stopped


def test_a_detach_that_stops_nothing_leaves_no_node() -> None:
    class Idle(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.detach().contiguous().clone().view(5, D)).sum()

    captured = capture(Idle(), (torch.randn(5, D),))
    ops = [n.op for n in captured.graph.nodes if isinstance(n.op, torch._ops.OpOverload)]
    assert ops == [aten.linear.default, aten.sum.default]
