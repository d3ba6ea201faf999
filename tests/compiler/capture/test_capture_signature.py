"""Inputs by name, outputs by path, and the scalar that is the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.compiler.capture.capture import Captured, capture
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import INPUT
from tests.compiler.interpreter import output_labels, run

X, Y = torch.randn(2, 4), torch.randn(2, 4)


@dataclass
class Output:
    loss: Tensor
    logits: Tensor
    cache: Any = None


class Returns(nn.Module):
    """Returns what `make` makes of its layer's result."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.a(x))


class Many(nn.Module):
    def forward(self, x: Tensor, *rest: Tensor, scale: float = 1.0, **named: Any) -> Tensor:
        return (x * scale).sum() + sum(t.sum() for t in rest) + named["batch"]["y"].sum()


def labels(make: Callable[[Tensor], Any], **options: Any) -> tuple[str, ...]:
    return output_labels(capture(Returns(make), (X,), **options))


def refusal(make: Callable[[Tensor], Any], **options: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        labels(make, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda h: h.sum(),
        lambda h: {"loss": h.sum(), "aux": h.mean()},
        lambda h: Output(h.sum(), h, cache=object()),
        lambda h: (h, h.sum()),
        lambda h: [h, {"inner": h.sum()}],
    ],
)
def test_the_loss_is_found_in_any_output(make: Callable[[Tensor], Any]) -> None:
    model = Returns(make)
    captured = capture(model, (X,))
    assert output_labels(captured) == ("loss",)
    assert torch.equal(run(captured, X)["loss"], model.a(X).sum())


def test_the_loss_can_be_a_path_or_a_function() -> None:
    several = {"first": torch.Tensor.sum, "second": torch.Tensor.mean}
    make = lambda h: {name: function(h) for name, function in several.items()}  # noqa: E731
    model = Returns(make)
    by_path = capture(model, (X,), loss="second")
    by_function = capture(model, (X,), loss=lambda output: output["second"] * 2)
    assert torch.equal(run(by_path, X)["loss"] * 2, run(by_function, X)["loss"])


def test_outputs_are_named_by_their_path() -> None:
    make = lambda h: {"loss": h.sum(), "states": (h, [h * 2])}  # noqa: E731
    assert labels(make, outputs=("states.1.0",)) == ("loss", "output:states.1.0")
    everything = ("output:loss", "output:states.0", "output:states.1.0")
    assert labels(make, mode="infer") == everything
    assert labels(lambda h: h, mode="infer") == ("output",)
    assert labels(lambda h: h.sum(), outputs=("output",)) == ("loss", "output")


def test_what_is_wrong_with_an_output_is_said(golden: Callable[[str, str], None]) -> None:
    texts = [
        refusal(lambda h: {"first": h.sum(), "second": h.mean()}),
        refusal(lambda h: {"logits": h}),
        refusal(lambda h: h),
        refusal(lambda h: {"loss": h}),
        refusal(lambda h: {"loss": h.sum()}, loss="los"),
        refusal(lambda h: {"loss": h.sum()}, outputs=("logits",)),
        refusal(lambda h: h, loss=lambda output: 3),
        refusal(lambda h: "text", mode="infer"),
    ]
    golden("capture_outputs", "\n\n".join(texts))


def spec() -> Captured:
    return capture(Many(), ((X, Y), {"scale": 2.0, "batch": {"y": Y}}))


def test_inputs_are_named_by_the_parameters_of_forward() -> None:
    captured = spec()
    assert captured.input_names == ("x", "rest.0", "batch.y")
    inputs = [node.args for node in captured.graph.nodes if node.op == INPUT]
    assert inputs == [("argument", name) for name in captured.input_names]


def test_positional_and_keyword_inputs_are_one_thing() -> None:
    class Plain(nn.Module):
        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return (tokens * targets).sum()

    captured = capture(Plain(), {"targets": Y, "tokens": X})
    assert captured.input_names == ("tokens", "targets")
    for args, kwargs in (((X, Y), {}), ((X,), {"targets": Y}), ((), {"targets": Y, "tokens": X})):
        flat = captured.input_spec.flatten(args, kwargs)
        assert flat[0] is X
        assert flat[1] is Y


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x - 2 * y).sum()

    captured = capture(Plain(), (X, X))
    assert captured.input_names == ("x", "y")
    assert torch.equal(run(captured, X, Y)["loss"], (X - 2 * Y).sum())


def test_what_differs_from_the_example_is_said(golden: Callable[[str, str], None]) -> None:
    flatten = spec().input_spec.flatten
    right = {"scale": 2.0, "batch": {"y": Y}}
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((X,), right),
        ((X, Y, Y), right),
        ((X[:1], Y.double()), right),
        ((X, Y), {**right, "scale": 3.0}),
        ((X, Y), {"batch": {"y": Y}}),
        ((X, Y), {**right, "batch": {"y": 1}}),
        ((), right),
    ]
    texts = []
    for args, kwargs in calls:
        with pytest.raises(CaptureError) as caught:
            flatten(args, kwargs)
        texts.append(str(caught.value))
    golden("capture_inputs", "\n\n".join(texts))


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CaptureError, match="do not fit `forward\\(x\\)`"):
        capture(Returns(torch.Tensor.sum), (X, Y))
    with pytest.raises(CaptureError, match="the example is a `int`"):
        capture(Returns(torch.Tensor.sum), 3)
