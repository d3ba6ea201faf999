"""What capturing leaves out of an export is made where somebody asks, and nothing is lost."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from meshwright.compiler.capture.capture import capture
from meshwright.compiler.capture.tracing.shortcuts import without_texts


def doubled(x: Tensor) -> Tensor:
    return x * 2


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean()
        return doubled(self.up(x) * scale).sum()


def test_capturing_puts_no_graph_to_code(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[fx.GraphModule] = []
    monkeypatch.setattr("meshwright.compiler.capture.tracing.shortcuts._compile", compiled.append)
    graph = capture(Scaled(), (torch.ones(2, 4),)).graph
    assert len(graph.nodes) > 5
    assert not compiled


def test_a_node_knows_the_line_of_the_forward_that_called_a_helper() -> None:
    graph = capture(Scaled(), (torch.ones(2, 4),)).graph
    lines, first = inspect.getsourcelines(Scaled.forward)
    line = first + next(i for i, text in enumerate(lines) if "doubled" in text)
    (node,) = [n for n in graph.nodes if n.args[1:] == (2,)]
    assert node.origin.source == f"{Path(__file__).name}:{line}"


def test_a_graph_module_is_compiled_when_it_is_called_and_again_after_a_change() -> None:
    module = torch.nn.Sequential(nn.ReLU())
    with without_texts():
        traced = fx.symbolic_trace(module)
        assert str(traced)
        assert traced(torch.tensor(-1.0)) == 0
        (relu,) = traced.graph.find_nodes(op="call_module", target="0")
        relu.replace_all_uses_with(relu.args[0])
        traced.graph.erase_node(relu)
        traced.recompile()
        assert traced(torch.tensor(-1.0)) == -1
    assert traced(torch.tensor(-2.0)) == -2
    assert "return" in fx.symbolic_trace(module).code
