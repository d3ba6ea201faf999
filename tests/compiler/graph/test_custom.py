"""Registered functions: one operator in the graph, with a rule and a vjp; right in eager mode."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.capture.capture import capture
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.annotate import LAYOUT, layout
from meshwright.compiler.graph.custom import REGISTRY, custom
from tests.compiler.interpreter import check_equal_to_eager


class Round(torch.autograd.Function):
    """Straight-through rounding to steps of `step`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float) -> Tensor:
        ctx.save_for_backward(x)
        return (x / step).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Halves(torch.autograd.Function):
    """Two results, in the newer style with a separate context."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y, x * 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return first * y + second, first * x


def halves_vjp(grads: Any, inputs: Any, outputs: Any) -> tuple[Tensor, Tensor]:
    (first, second), (x, y) = grads, inputs
    return first * y + second, first * x


custom(Round, rule="... -> ...", vjp=lambda grads, inputs, outputs: (grads[0], None))
custom(Halves, rule="..., ... -> ..., ...", vjp=halves_vjp)
cube = custom(
    lambda x: x**3,
    rule="... -> ...",
    vjp=lambda grads, inputs, outputs: grads[0] * 3 * inputs[0] ** 2,
)


class Uses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        first, second = Halves.apply(h, h + 1)
        return (Round.apply(h, step=0.5) * h + first * second + cube(h)).sum()


def test_a_function_without_a_name_can_be_registered() -> None:
    scaled = custom(
        functools.partial(torch.mul, torch.tensor(2.0)),
        rule="... -> ...",
        vjp=lambda grads, inputs, outputs: grads[0] * 2,
    )
    x = torch.ones(3, requires_grad=True)
    scaled(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 3


def test_registered_functions_are_one_operator_each_with_their_own_gradient() -> None:
    captured = check_equal_to_eager(Uses(), (torch.randn(3, 4, dtype=torch.float64),))
    found = [n for n in captured.graph.nodes if n.op in REGISTRY]
    assert [REGISTRY[n.op].name for n in found] == ["Halves", "Round", "lambda_"]
    assert found[1].args[1] == 0.5
    assert REGISTRY[found[1].op].rule == "... -> ..."
    assert all(node.requires_grad for node in found)
    assert found[1].origin.source.startswith("test_custom.py:")


def test_an_operator_of_torch_library_with_its_own_autograd_is_accepted() -> None:
    @torch.library.custom_op("meshwright_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    double.register_autograd(lambda ctx, grad: grad * 2)

    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return double(self.a(x)).sum()

    captured = check_equal_to_eager(Doubles(), (torch.randn(3, 4, dtype=torch.float64),))
    assert torch.ops.meshwright_test.double.default in [n.op for n in captured.graph.nodes]


def test_an_operator_whose_derivative_needs_values_is_refused_by_name(
    golden: Callable[[str, str], None],
) -> None:
    @torch.library.custom_op("meshwright_test::by_largest", mutates_args=())
    def by_largest(x: Tensor) -> Tensor:
        return x * 2

    by_largest.register_fake(torch.empty_like)
    by_largest.register_autograd(lambda ctx, grad: grad * grad.max().item())

    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return by_largest(self.a(x)).sum()

    plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp")
    with pytest.raises(CaptureError) as caught:
        meshwright.compile(Largest(), plan, example=(torch.randn(4, 4),))
    text = re.sub(r"test_custom\.py:\d+", "test_custom.py:LINE", str(caught.value))
    golden("custom_untraceable_backward", text)


def test_a_vjp_without_a_gradient_for_each_argument_is_refused() -> None:
    product = custom(
        lambda x, y: x * y,
        rule="..., ... -> ...",
        vjp=lambda grads, inputs, outputs: (grads[0] * inputs[1],),
    )

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return product(self.a(x), self.a(x + 1)).sum()

    plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp")
    with pytest.raises(CaptureError, match="its vjp returns 1 gradient for 2 arguments"):
        meshwright.compile(Product(), plan, example=(torch.randn(4, 4),))


@pytest.mark.parametrize("given", [{1}, [torch.ones(2), torch.ones(2)]])
def test_an_argument_that_no_operator_takes_is_refused(given: Any) -> None:
    with pytest.raises(CaptureError, match=f"`lambda_` is given a `{type(given).__name__}`"):
        cube(given)


def test_a_layout_marks_an_activation_and_changes_nothing_in_eager_mode() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return layout(self.a(x), "[b@dp, d]").pow(2).sum()

    x = torch.randn(3, 4, dtype=torch.float64)
    assert layout(x, "[b, d]") is x
    captured = check_equal_to_eager(Marked(), (x,))
    (mark,) = [n for n in captured.graph.nodes if n.op == LAYOUT]
    assert mark.args[1] == "[b@dp, d]"
    assert mark.requires_grad
    assert not capture(Marked(), (x,), mode="eval").graph.nodes[-2].requires_grad
