"""A function of tensors as a fragment: traced once, replayed on nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.fragment import Fragment, FragmentCall, read, traced
from meshwright.compiler.graph.ir import GETITEM, INPUT, Builder, Node, TensorType
from meshwright.compiler.graph.slots import Slot, filled, slotted
from meshwright.compiler.layout.mesh import Mesh

aten = torch.ops.aten
ROWS = TensorType((4, 6), torch.float32)


def fragment(function: Any) -> Fragment:
    first, second, *_, output = traced(function, [ROWS, ROWS]).nodes
    return read("the function", [first, second], output.args[0])


def replayed(found: Fragment) -> list[str]:
    """The calls of a fragment on two inputs, and what stands for its results."""
    builder = Builder("replayed", Mesh(()))
    parameters = [builder.emit(INPUT, ("argument", name), type=ROWS, name=name) for name in "xy"]

    def emit(slot: int, call: FragmentCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        assert slot == len(builder.nodes)
        return builder.emit(call.op, args, kwargs, type=call.type)

    results = found.replay(parameters, emit)
    calls = [f"{node.name} = {node.op}{node.args}" for node in builder.nodes[2:]]
    return [*calls, f"{results}"]


def test_calls_are_replayed_on_what_stands_for_the_parameters() -> None:
    def halves(tensors: list[Tensor]) -> list[Tensor]:
        x, y = tensors
        first, _ = (x * y).split(3, 1)
        return [first, y]

    assert replayed(fragment(halves)) == [
        "mul = aten.mul.Tensor(%x, %y)",
        "split = aten.split.Tensor(%mul, 3, 1)",
        "getitem = mesh::getitem(%split, 0)",
        "[%getitem, %y]",
    ]


def test_what_no_result_needs_is_left_out() -> None:
    def wasteful(tensors: list[Tensor]) -> list[Tensor]:
        x, y = tensors
        x.exp()
        return [y.sin()]

    assert [call.op for call in fragment(wasteful).calls] == [aten.sin.default]


def test_a_tensor_from_elsewhere_is_refused() -> None:
    def constant(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0] + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])]

    with pytest.raises(PassError, match="the function holds a constant tensor"):
        fragment(constant)


def test_arguments_without_operands_are_equal_for_equal_calls() -> None:
    builder = Builder("calls", Mesh(()))
    x, y = (builder.emit(INPUT, ("argument", name), type=ROWS, name=name) for name in "xy")
    assert slotted(([x, y], 0), {}) == slotted(([y, x], 0), {}) == (((Slot(0), Slot(1)), 0), ())
    assert slotted((x,), {"b": y, "a": x})[1] == (("a", Slot(1)), ("b", Slot(2)))
    assert filled(((Slot(1), None), 2), ["x", "y"]) == [["y", None], 2]
    assert FragmentCall(GETITEM, (Slot(0), 1), (), ROWS) == FragmentCall(
        GETITEM, (Slot(0), 1), (), ROWS
    )
