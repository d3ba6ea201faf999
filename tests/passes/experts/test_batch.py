"""The pass `batch`: what the graph says of one expert, for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.capture.capture import capture
from meshwright.compiler.errors import CaptureError
from meshwright.passes.experts import batch, ragged
from meshwright.passes.experts.replace import with_mixtures
from tests.passes.experts.dense import Model
from tests.passes.experts.dense import batch as rows
from tests.passes.experts.test_equal import check_dense
from tests.passes.stages import check_documented, shown, stages

PLAN = "mesh ep=2\nexperts blocks.*.mlp over ep count=4\n"


class Bare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu()


def test_the_docstring_shows_a_linear_before_and_after() -> None:
    model, (x, labels) = Model(1, make=Bare), rows(2, 6)
    example = (x.float(), labels)
    plan = meshwright.Plan.parse(PLAN)
    mixed = with_mixtures(model, capture(model, example), plan)
    found = stages(mixed, example, PLAN)
    before = [node.name for node in found["captured"].nodes if "experts" in node.origin.module]
    after = [node.name for node in found["batch"].nodes if "experts" in node.origin.module]
    check_documented(batch, shown(found["captured"], *before), shown(found["batch"], *after))


def test_the_docstring_shows_a_linear_of_rows_before_and_after() -> None:
    model, (x, labels) = Model(1, make=Bare), rows(2, 6)
    example, text = (x.float(), labels), f"{PLAN.strip()} dropless=true\n"
    mixed = with_mixtures(model, capture(model, example), meshwright.Plan.parse(text))
    found = stages(mixed, example, text)
    graphs = [found["captured"], found["batch"]]
    names = [[n.name for n in g.nodes if "mlp.experts" in n.origin.module] for g in graphs]
    check_documented(ragged, *(shown(g, *own) for g, own in zip(graphs, names, strict=True)))


class Gated(nn.Module):
    """A gate and an up projection in one, split apart, on rows without the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 24, bias=False), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        gate, up = self.both(x.view(rows * tokens, width)).chunk(2, -1)
        return self.down(gate.sigmoid() * up).view(x.shape)


class Normed(nn.Module):
    """Norms and parameters that are no matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.scale = nn.LayerNorm(width), nn.Linear(width, 12), nn.RMSNorm(12)
        self.down, self.gain = nn.Parameter(torch.randn(12, width)), nn.Parameter(torch.rand(width))
        self.register_buffer("shift", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.up(self.norm(x)).tanh()) @ self.down * self.gain + self.shift


class Transposed(nn.Module):
    """Products with rows of inputs, by `addmm`, and with a turned parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(torch.randn(width, 12)), nn.Parameter(torch.rand(12))
        self.down = nn.Parameter(torch.randn(width, 12))

    def forward(self, x: Tensor) -> Tensor:
        up = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.up).relu()
        return torch.mm(up, self.down.t()).view_as(x)


@pytest.mark.parametrize("make", [Gated, Normed, Transposed])
def test_what_a_module_does_is_done_for_every_expert(make: type[nn.Module]) -> None:
    plan = "mesh dp=2\ndata x, labels over dp\nexperts blocks.*.mlp over dp count=2"
    check_dense(plan, model=Model(1, make=make), steps=1)


class Heads(nn.Module):
    """Multiple rows of each token, and what no expert has a weight for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gain = nn.Linear(width // 2, width // 2), nn.Parameter(torch.rand(width))
        self.register_buffer("turn", torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up((x @ self.turn).unflatten(-1, (2, -1))).softmax(-2)
        return (heads.flatten(-2) * self.gain.tanh() @ self.turn) * x


@pytest.mark.parametrize("make", [Normed, Transposed, Heads])
def test_what_a_module_does_is_done_for_every_choice(make: type[nn.Module]) -> None:
    plan = "mesh dp=2, ep=1\ndata x, labels over dp\nexperts blocks.*.mlp over ep count=3"
    check_dense(f"{plan} dropless=true", model=Model(1, make=make))


class Constant(Bare):
    """Gives each token what depends on it only in its first half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.up(x)[..., :4], self.up.bias[4:].expand(*x.shape[:-1], 4)], -1)


def test_what_cannot_be_done_row_by_row_is_named() -> None:
    plan = meshwright.Plan.parse(f"{PLAN.strip()} dropless=true\n")
    with pytest.raises(CaptureError, match=r"cat.*cannot run for rows of different experts"):
        meshwright.compile(Model(1, make=Constant).double(), plan, example=rows(2, 6))


class Counted(Bare):
    def forward(self, x: Tensor) -> Tensor:
        return torch.poisson(self.up(x).abs())


def test_an_operator_that_cannot_run_for_all_experts_is_named() -> None:
    plan = meshwright.Plan.parse(PLAN)
    with pytest.raises(CaptureError, match=r"poisson.*cannot run for all experts at once"):
        meshwright.compile(Model(1, make=Counted).double(), plan, example=rows(2, 6))
