"""Run a captured graph node by node under autograd: the plainest thing that a graph can mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.capture import Captured, capture
from meshwright.compiler.ir import GETITEM, INPUT, Node, map_nodes
from meshwright.compiler.mesh import Mesh

MESH = Mesh(())


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
            assert type is None or (tuple(value.shape), value.dtype) == (type.shape, type.dtype)
    return {label: values[node] for label, node in captured.graph.outputs}


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


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """The gradients of `loss` by parameter."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def check_equal_to_eager(
    model: nn.Module, example: Any, *, loss: Any = lambda out: out, tolerance: float = 1e-12
) -> Captured:
    """Capture `model`; its graph must give eager mode's loss and gradients, None where it has none."""
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
    captured = capture(model, example, MESH, loss=loss)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    outputs = run(captured, *args, **kwargs)
    theirs = gradients(model, outputs["loss"])
    torch.manual_seed(7)
    expected = loss(model(*args, **kwargs))
    torch.testing.assert_close(outputs["loss"], expected, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients(model, expected).items():
        assert (gradient is None) == (theirs[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(theirs[name], gradient, rtol=tolerance, atol=tolerance)
    for label, value in outputs.items():
        kind, _, name = label.partition(":")
        if kind == "buffer":
            torch.testing.assert_close(value, dict(model.named_buffers())[name])
    model.load_state_dict(state)
    _check_requires_grad(captured)
    return captured


def _check_requires_grad(captured: Captured) -> None:
    """Where a node says that no parameter feeds it, it must be so: its operands have no gradient."""
    for label, node in captured.graph.outputs:
        assert node.requires_grad or label != "loss" or not captured.parameters
