"""Differentiation from several outputs with given cotangents, to parameters and float inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.autodiff.differentiate import differentiate
from meshwright.compiler.graph.ir import (
    INPUT,
    Builder,
    Graph,
    InputKind,
    Node,
    OutputKind,
    Phase,
    TensorType,
    map_nodes,
    rewrite,
)
from meshwright.compiler.layout.mesh import Mesh
from meshwright.passes.driver import PASSES, capture
from meshwright.passes.lower import lower
from meshwright.passes.statements.draft import Draft
from tests.compiler.running import run_graph
from tests.models import real

PLANS = {
    "data": "mesh dp=2\ndata x over dp",
    "tensor": "mesh tp=4\ncolumns up over tp\nrows down over tp",
    "both": "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\nrows down over tp",
}


class Forked(nn.Module):
    """Two outputs, one of them behind a norm, and a parameter that is worked on before its use."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.shift = nn.LayerNorm(32), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        h = F.gelu(self.up(x))
        a, b = self.down(h) + self.shift.exp(), self.norm(h) * scale
        return {"loss": a.sum() + b.sum(), "a": a, "b": b}


def wanting(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node:
    """A node with gradients wanted for every float input before it."""
    wants = node.op == INPUT or any(mapping[n].requires_grad for n in node.operands())
    alone = isinstance(node.type, TensorType)
    return builder.emit(
        node.op,
        map_nodes(node.args, mapping.__getitem__),
        node.kwargs,
        type=node.type,
        origin=node.origin,
        requires_grad=wants and (not alone or node.tensor.differentiable),
        name=node.name,
    )


def placed(model: nn.Module, example: tuple[Tensor, ...], plan: str) -> Graph:
    """The forward as it is differentiated, with gradients wanted for float inputs."""
    source, parsed = capture(model, example, outputs=("a", "b")), meshwright.Plan.parse(plan)
    mesh = Mesh(parsed.mesh)
    graph = replace(rewrite(source.captured.graph, wanting), mesh=mesh)
    draft = Draft(parsed, mesh, source.captured, graph, source.modules)
    for each in PASSES:
        if each.__name__ == "differentiate":
            break
        draft = each(draft)
    return draft.graph


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_several_outputs_are_differentiated_with_given_cotangents(plan: str) -> None:
    model = Forked().double()
    x, scale = (real(8, 16).requires_grad_(), real(32).requires_grad_())
    cotangents = {"a": real(8, 16), "b": real(8, 32)}
    forward = placed(model, (x.detach(), scale.detach()), plan)
    joint, _ = differentiate(forward, seeds=forward.outputs_of(OutputKind.OUTPUT))
    weights = dict(model.named_parameters())
    given = {"x": x, "scale": scale, **weights, **cotangents}
    found = run_graph(lower(joint), {name: tensor.detach() for name, tensor in given.items()})
    outputs = model(x, scale)
    leaves = {**{f"gradient:{name}": w for name, w in weights.items()}}
    leaves |= {"cotangent:x": x, "cotangent:scale": scale}
    expected = torch.autograd.grad(
        [outputs["a"], outputs["b"]], [*leaves.values()], [*cotangents.values()]
    )
    for label, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found[label], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_cotangents_lie_in_the_dual_layouts_of_their_values(plan: str) -> None:
    forward = placed(Forked().double(), (real(8, 16), real(32)), plan)
    joint, _ = differentiate(forward, seeds=forward.outputs_of(OutputKind.OUTPUT))
    inputs = {node.args[1]: node for node in joint.inputs}
    for output in joint.outputs_of(OutputKind.COTANGENT, OutputKind.GRADIENT):
        assert output.node.placed == inputs[output.name].placed.dual()
    for output in joint.outputs_of(OutputKind.OUTPUT):
        seed = inputs[output.name]
        assert seed.args[0] == InputKind.COTANGENT
        assert seed.placed == output.node.placed.dual()


def test_an_output_without_a_cotangent_gives_no_gradient() -> None:
    forward = placed(Forked().double(), (real(8, 16), real(32)), PLANS["data"])
    (first, _) = forward.outputs_of(OutputKind.OUTPUT)
    joint, _ = differentiate(forward, seeds=[first])
    found = {each.name for each in joint.outputs_of(OutputKind.GRADIENT, OutputKind.COTANGENT)}
    assert found == {"up.weight", "up.bias", "down.weight", "down.bias", "shift", "x"}


def test_the_weight_phase_is_what_no_cotangent_of_an_activation_depends_on() -> None:
    forward = placed(Forked().double(), (real(8, 16), real(32)), PLANS["both"])
    joint, _ = differentiate(forward)
    phases = {node: node.phase for node in joint.nodes}
    for node in joint.nodes:
        behind = [phases[operand] for operand in node.operands()]
        assert phases[node] is not Phase.FORWARD or set(behind) <= {Phase.FORWARD}
        assert phases[node] is Phase.WEIGHT or Phase.WEIGHT not in behind
    of = {output.name: output.node for output in joint.outputs}
    assert of["x"].phase is Phase.BACKWARD
    assert {of[name].phase for name in ("up.weight", "down.bias", "shift")} == {Phase.WEIGHT}
    products = [node.phase for node in joint.nodes if node.name.startswith("mm")]
    assert products == [Phase.WEIGHT] * 2
    # The cotangent of `shift.exp()` is one of a value that is computed from parameters alone.
    (back,) = (n for n in of["shift"].operands() if n.name.startswith("mul"))
    assert back.phase is Phase.WEIGHT
