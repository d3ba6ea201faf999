"""A custom function made of torch operators is traced, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import meshwright as mw
from meshwright.compiler.capture.capture import capture
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.custom import REGISTRY
from meshwright.compiler.placing.candidates import Candidates
from meshwright.compiler.placing.choose import Choice, choose
from meshwright.passes.placing import layouts
from tests.compiler.interpreter import check_equal_to_eager
from tests.equivalence import check_equal


class Gelu(torch.autograd.Function):
    """Not the derivative of its forward, so that what autograd would do shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x * torch.sigmoid(1.702 * x) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return (grad * 0.7 * torch.sigmoid(x) * ctx.scale).clamp(-1, 1), None


class Affine(torch.autograd.Function):
    """Saves what it makes, in both ways; two results, of which one has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        out = x @ weight.t()
        ctx.large = out.abs() > 0.5
        ctx.save_for_backward(x, weight)
        top = out.argmax(-1).to(out.dtype)
        ctx.mark_non_differentiable(top)
        return (out if bias is None else out + bias), top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = torch.where(ctx.large, grad, grad * 2)
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        left = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return (grad @ weight if ctx.needs_input_grad[0] else None), left, bias


class Pair(torch.autograd.Function):
    """Two results in the newer style; the gradient of an unused one is None."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y, x - y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Any:
        x, y = ctx.saved_tensors
        return (second if first is None else first * y * 3), None if first is None else first * x


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(2):
            h = h + self.down(Gelu.apply(self.up(h), 0.5))
        out, top = Affine.apply(h, self.weight, self.bias)
        plain, _ = Affine.apply(x, self.weight, None)
        both, less = Pair.apply(out, plain + h)
        alone, _ = Pair.apply(out, less)
        return (both + less + alone * (1 + top).unsqueeze(-1)).square().mean()


def rows() -> tuple[Tensor]:
    return (torch.randn(8, 3, 8, dtype=torch.float64),)


@pytest.mark.parametrize(
    "plan",
    [
        "mesh dp=2\ndata x over dp\n",
        "mesh tp=4\ncolumns up over tp\nrows down over tp\n",
        "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\nrows down over tp\n",
        "mesh dp=2, tp=2\ndata x over dp\nshard weight [8@tp, 8]\n",
    ],
)
def test_the_traced_backward_is_the_functions_own_under_every_plan(plan: str) -> None:
    torch.manual_seed(0)
    program = check_equal(Layered(), rows, plan)
    assert not any(
        node.op in REGISTRY for graph in program.graphs().values() for node in graph.nodes
    )


def test_what_a_function_keeps_for_its_backward_adds_no_placements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = []

    def counted(candidates: Candidates, *args: Any, **kwargs: Any) -> Choice:
        most.append(max(map(len, candidates.of.values())))
        return choose(candidates, *args, **kwargs)

    monkeypatch.setattr(layouts, "choose", counted)
    plan = "mesh dp=2, tp=2\ndata x over dp\nshard weight [8@tp, 8]\n"
    mw.compile(Layered(), mw.Plan.parse(plan), example=rows())
    assert max(most) <= 16


def test_equal_calls_share_one_operator() -> None:
    graph = capture(Layered().double(), rows()).graph
    found = [REGISTRY[node.op].name for node in graph.nodes if node.op in REGISTRY]
    assert len(found) == 6
    assert len(set(found)) == 4


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float, y: Tensor) -> Tensor:
        return x * y * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.from_numpy(grad.numpy()), None, None


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Applies(nn.Module):
    def __init__(self, function: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.a, self.function, self.args, self.kwargs = nn.Linear(4, 4), function, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.a(x) * 1, *self.args, **self.kwargs).sum()


def test_a_backward_that_leaves_torch_is_refused_with_the_vjp_to_write() -> None:
    with pytest.raises(CaptureError, match="the backward of `Numpy`") as caught:
        capture(Applies(Numpy, 2.0, torch.ones(4)), (torch.randn(2, 4),))
    assert caught.value.culprit.startswith("test_functions.py:")
    assert "`inputs` is `(x, step, y)`" in caught.value.help
    assert "`(grad_x, grad_step, grad_y)` is returned" in caught.value.help


class Scaled(torch.autograd.Function):
    """Has a default, which a call binds, and an attribute of its own on the context."""

    @staticmethod
    def forward(x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.constant = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.constant * 3, None


class Halved(torch.autograd.Function):
    """As `Scaled`, in the older style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float = 2.0) -> Tensor:
        ctx.constant = scale
        return x * scale / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.constant, *[None] * (len(ctx.needs_input_grad) - 1)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return grad * y * 3, grad * x


def test_a_keyword_of_a_function_has_a_gradient() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(self.a(x), y=self.a(x) + 1).sum()

    check_equal_to_eager(Squared(), (torch.randn(2, 4).double(),))


@pytest.mark.parametrize("function", [Scaled, Halved])
@pytest.mark.parametrize("given", [{}, {"scale": 5.0}])
def test_a_function_has_its_defaults_and_its_keywords(function: Any, given: Any) -> None:
    model = Applies(function, **given).double()
    check_equal_to_eager(model, (torch.randn(2, 4).double(),))


def test_a_function_that_writes_to_its_input_is_refused() -> None:
    with pytest.raises(CaptureError, match="mark_dirty"):
        capture(Applies(Doubled), (torch.randn(2, 4),))
