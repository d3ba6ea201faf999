"""Programs of multiple stages, in whatever order ranks run their actions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.autodiff.differentiate import differentiate
from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import (
    INPUT,
    Builder,
    Graph,
    InputKind,
    Node,
    Output,
    OutputKind,
    Phase,
)
from meshwright.compiler.public import Program
from meshwright.compiler.schedules.actions import Action
from meshwright.compiler.schedules.tables import Table
from meshwright.compiler.stages import Stage
from meshwright.passes.bucket import bucketed
from meshwright.passes.lower import lower
from meshwright.passes.needs import Needs
from meshwright.passes.separate import separate_graph
from meshwright.passes.statements.checkpoint import Regions
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, Mlp, real, rows, tokens
from tests.passes.stages import stages as passed

F_, B, W = Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT
TOGETHER, APART = (F_, B), (F_, B, W)


def cut(graph: Graph, *after: str) -> list[Graph]:
    """The graph in stages: each ends with the node of that name and has all that it needs.

    What a later stage uses of an earlier one is sent to it, parameters too.
    """
    named = {node.name: node for node in graph.nodes}
    stage_of: dict[Node, int] = {}
    for number, name in enumerate(after):
        pending = [named[name]]
        while pending:
            node = pending.pop()
            if node not in stage_of:
                stage_of[node] = number
                pending += node.operands()
    for node in graph.nodes:
        stage_of.setdefault(node, len(after))
    return [_stage(graph, number, stage_of) for number in range(len(after) + 1)]


def _shared(node: Node) -> bool:
    """Whether every stage is given an input."""
    return node.held and node.args[0] != InputKind.PARAMETER


def _stage(graph: Graph, number: int, stage_of: dict[Node, int]) -> Graph:
    builder = Builder(f"stage{number}", graph.mesh)
    mapping: dict[Node, Node] = {}
    outputs: list[Output] = []
    for node in graph.nodes:
        users = [user for user in graph.users()[node] if stage_of[user] == number]
        if stage_of[node] == number or (_shared(node) and users):
            mapping[node] = builder.copy(node, mapping)
        elif stage_of[node] < number and users:
            mapping[node] = builder.emit(
                INPUT,
                (InputKind.RECEIVED, f"{node.name} for {number}"),
                type=node.type,
                layout=node.layout,
                requires_grad=node.requires_grad,
                name=node.name,
            )
        if stage_of[node] == number and not _shared(node):
            takers = sorted({stage_of[user] for user in graph.users()[node]} - {number})
            outputs += [
                Output(OutputKind.SENT, f"{node.name} for {taker}", mapping[node])
                for taker in takers
            ]
    own = [out.of(mapping[out.node]) for out in graph.outputs if stage_of[out.node] == number]
    return builder.graph([*own, *outputs])


def stage(number: int, forward: Graph, phases: Sequence[Phase]) -> Stage:
    """A stage with its backward, in as many graphs as there are phases."""
    joint, _ = differentiate(forward)
    joint = bucketed(lower(joint))
    needs = Needs(joint, phases, lambda _: False, Regions({}, joint))
    parts = separate_graph(joint, f"stage{number}", needs)
    return Stage(number, parts)


def in_stages(
    model: nn.Module,
    example: Any,
    plan: str,
    after: Sequence[str],
    phases: Sequence[Phase],
    order: Iterable[tuple[Phase, int]],
) -> tuple[Program, Program]:
    """The program as it is compiled, and in stages, which each rank runs in this order."""
    program = meshwright.compile(model, meshwright.Plan.parse(plan), example)
    graph = passed(model, example, plan)["move_varies"]
    stages = tuple(stage(i, each, phases) for i, each in enumerate(cut(graph, *after)))
    actions = tuple(Action(kind, number) for kind, number in order)
    table = Table(1, ((0,),) * len(stages), (actions,))
    return program, replace(program, stages=stages, table=table)


def check_same(one: Program, other: Program, example: Any) -> None:
    """Assert that two programs give the same loss and gradients, in two steps that add up."""
    runs = [program.launch() for program in (one, other)]
    for _ in range(2):
        losses = [run.step(*example) for run in runs]
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
    expected, found = (run.gradients() for run in runs)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    for run in runs:
        run.check()


DATA = "mesh dp=2\ndata x over dp\n"
TENSOR = "mesh tp=2\ncolumns up over tp\nrows down over tp\n"
BOTH = "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\nrows down over tp\n"
ZERO_BUBBLE = [(F_, 0), (F_, 1), (B, 1), (B, 0), (W, 1), (W, 0)]


@pytest.mark.parametrize("plan", [DATA, TENSOR, BOTH])
@pytest.mark.parametrize("after", ["linear", "gelu", "linear_1"])
def test_two_stages_give_what_one_does(plan: str, after: str) -> None:
    """`linear_1` is a pending sum where `down` is split by rows, so its cotangent varies."""
    order = [(F_, 0), (F_, 1), (B, 1), (B, 0)]
    one, two = in_stages(Mlp().double(), rows(), plan, [after], TOGETHER, order)
    assert list(two.graphs()) == [
        "stage0.forward", "stage0.backward", "stage1.forward", "stage1.backward"
    ]  # fmt: skip
    check_same(one, two, rows())


@pytest.mark.parametrize("order", [ZERO_BUBBLE, [*ZERO_BUBBLE[:3], (W, 1), (B, 0), (W, 0)]])
def test_gradients_of_parameters_may_be_computed_later(order: list[tuple[Phase, int]]) -> None:
    one, two = in_stages(Mlp().double(), rows(), BOTH, ["gelu"], APART, order)
    first, second = two.stages
    for each in two.stages:
        assert not each.graphs[B].outputs_of(OutputKind.GRADIENT)
        assert not each.sent(W)
    assert {o.name for o in second.graphs[W].outputs} == {"down.weight", "down.bias"}
    assert (first.parameters, second.parameters) == (
        ("up.weight", "up.bias"),
        ("down.weight", "down.bias"),
    )
    (activation,), (cotangent,) = second.received(F_), second.sent(B)
    assert (activation.args[1], cotangent.name) == ("gelu for 1", "gelu for 1")
    aten = torch.ops.aten
    for phase, product, other in ((B, aten.matmul, aten.mm), (W, aten.mm, aten.matmul)):
        ops = [node.op for node in second.graphs[phase].nodes]
        assert ops.count(product.default) == 1
        assert other.default not in ops
    check_same(one, two, rows())


@pytest.mark.parametrize("phases", [TOGETHER, APART])
def test_a_transformer_with_a_tied_head_runs_in_three_stages(phases: Sequence[Phase]) -> None:
    """The weight of the head is varied in the first stage, and sent to the last."""
    plan = f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}"
    model, example = Gpt().double(), tokens()
    last = [(W, number) for number in (2, 1, 0) if W in phases]
    order = [*((F_, i) for i in range(3)), *((B, i) for i in (2, 1, 0)), *last]
    one, three = in_stages(model, example, plan, ["add", "add_2"], phases, order)
    assert "vary for 2" in [output.name for output in three.stages[0].sent(F_)]
    check_same(one, three, example)


class Skipping(nn.Module):
    """Its first activation is used in every stage, and a buffer is written in each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.a(x))
        self.seen += 1.0  # type: ignore[operator]
        z = F.silu(self.b(y))
        self.last.copy_(z.detach().mean())  # type: ignore[operator]
        return (self.c(z) * y).square().mean()


def test_what_skips_a_stage_gets_one_cotangent_from_each_stage_that_uses_it() -> None:
    order = [*((F_, i) for i in range(3)), *((B, i) for i in (2, 1, 0))]
    model = Skipping().double()
    one, three = in_stages(model, rows(), DATA, ["gelu", "silu"], TOGETHER, order)
    assert [node.args[1] for node in three.stages[0].received(B)] == ["gelu for 1", "gelu for 2"]
    check_same(one, three, rows())
    runs = [program.launch() for program in (one, three)]
    batch = rows()
    for run in runs:
        run.step(*batch)
    assert runs[0].state_dict()["last"].equal(runs[1].state_dict()["last"])


def test_a_backward_in_two_graphs_gives_what_one_does() -> None:
    plan = f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}sequence blocks.* over tp\n"
    order = [(F_, 0), (B, 0), (W, 0)]
    one, parted = in_stages(Gpt().double(), tokens(), plan, [], APART, order)
    check_same(one, parted, tokens())


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ([(F_, 1), (F_, 0), (B, 1), (B, 0)], "`forward 1` .* comes before `forward 0`, which it"),
        ([(F_, 0), (F_, 1), (B, 0), (B, 1)], "`backward 0` .* comes before `backward 1`, which"),
        ([(F_, 0), (F_, 1), (W, 1)], "`weight 1` on rank 0 of the pipeline has no graph"),
        ([(F_, 0), (F_, 0)], "`forward 0` on rank 0 of the pipeline runs twice"),
    ],
)
def test_a_schedule_in_which_values_are_missing_is_refused(
    order: list[tuple[Phase, int]], problem: str
) -> None:
    with pytest.raises(PassError, match=problem):
        in_stages(Mlp().double(), rows(), DATA, ["gelu"], TOGETHER, order)


def test_gradients_of_microbatches_are_not_overwritten_without_a_word() -> None:
    program = meshwright.compile(Mlp(), meshwright.Plan.parse(DATA), (real(8, 16).float(),))
    actions = [Action(kind, 0, i) for i in range(2) for kind in (F_, B)]
    with pytest.raises(PassError, match=r"`forward 0 of microbatch 1` .* is of none of the micro"):
        replace(program, table=Table(1, ((0,),), (tuple(actions),)))
