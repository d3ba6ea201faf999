"""Run a captured graph node by node under autograd: the plainest thing that a graph can mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.capture.capture import Captured, capture
from meshwright.compiler.graph.ir import GETITEM, INPUT, Node, map_nodes


def output_labels(captured: Captured) -> tuple[str, ...]:
    """What a captured graph returns."""
    return tuple(output.label for output in captured.graph.outputs)


def run(captured: Captured, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The outputs of the graph by label, on the model's own parameters and buffers."""
    given = dict(zip(captured.input_names, captured.input_spec.flatten(args, kwargs), strict=True))
    tensors = {
        "parameter": captured.parameters,
        "buffer": captured.buffers,
        "constant": captured.constants,
        "argument": given,
    }
    values: dict[Node, Any] = {}
    for node in captured.graph.nodes:
        values[node] = _value(node, values, tensors)
        for value, type in zip(_many(values[node]), _many(node.type), strict=True):
            assert (tuple(value.shape), value.dtype) == (type.shape, type.dtype), node.name
    return {each.label: values[each.node] for each in captured.graph.outputs}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """The gradients of `loss` by parameter; None where it does not depend on one."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def check_equal_to_eager(
    model: nn.Module,
    example: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    tolerance: float = 1e-12,
) -> Captured:
    """Capture `model`; its graph must give eager mode's loss, gradients and new buffers."""
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured = capture(model, example, loss=loss)
    torch.manual_seed(7)
    outputs = run(captured, *args, **kwargs)
    found = gradients(model, outputs["loss"])
    torch.manual_seed(7)
    returned = model(*args, **kwargs)
    expected = loss(returned) if loss else returned
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(outputs["loss"], expected, **near)
    for name, gradient in gradients(model, expected).items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, **near)
    after = dict(model.named_buffers())
    for name, buffer in after.items():
        torch.testing.assert_close(outputs.get(f"buffer:{name}", before.get(name, buffer)), buffer)
    model.load_state_dict(before)
    return captured


def _value(node: Node, values: dict[Node, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    if node.op == INPUT:
        kind, name = node.args
        return tensors[kind][name]
    args = map_nodes(node.args, values.__getitem__)
    kwargs = {key: map_nodes(value, values.__getitem__) for key, value in node.kwargs.items()}
    if node.op == GETITEM:
        return args[0][args[1]]
    assert isinstance(node.op, torch._ops.OpOverload)
    return node.op(*args, **kwargs)


def _many(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
