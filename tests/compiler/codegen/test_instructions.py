"""The list of instructions: what is lowered, freed and printed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.codegen.instructions import (
    Call,
    Copy,
    Exchange,
    Free,
    Instruction,
    Return,
    Start,
    UnderWay,
    Variable,
    Wait,
    reads,
    target,
)
from meshwright.compiler.codegen.lowering import lowered
from meshwright.compiler.graph.ir import INPUT, Builder, Output, OutputKind, TensorType
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import everyone
from meshwright.compiler.placing.frame import BUCKET, bucket_type
from meshwright.passes.bucket import bucketed
from meshwright.runtime.transports import virtual

PLAN = meshwright.Plan.parse("mesh dp=2\ndata x over dp\n")


class Heads(nn.Module):
    """Modules whose names are words of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.yield_head, self.del_, self.x_handle = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.x_handle(self.del_(self.yield_head(x).relu()).relu()).square().mean()


def layers(count: int = 4, dim: int = 64) -> tuple[nn.Module, Tensor]:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x.square().mean()

    return Layers(), torch.randn(8, dim)


@pytest.mark.parametrize("mesh", ["mesh dp=1\n", "mesh dp=2\ndata x over dp\n"])
def test_modules_may_be_called_like_words_of_python(mesh: str) -> None:
    model, x = Heads(), torch.randn(4, 4)
    run = meshwright.compile(model, meshwright.Plan.parse(mesh), x).launch()
    torch.testing.assert_close(torch.as_tensor(run.step(x)), model(x).detach())


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bucketed.__kwdefaults__, "limit", 10_000)


def backward(program: meshwright.Program) -> tuple[Instruction, ...]:
    return program.instructions[-1].body


@pytest.mark.usefixtures("small_buckets")
def test_gradients_are_reduced_while_the_backward_goes_on() -> None:
    model, x = layers()
    program = meshwright.compile(model, PLAN, x)
    body, source = backward(program), program.code[-1].source
    requests = [line for line in source.splitlines() if "_Start(" in line]
    assert requests and all(line.endswith(", True)") for line in requests)
    starts = [i for i, each in enumerate(body) if isinstance(each, Start)]
    calls = [i for i, each in enumerate(body) if isinstance(each, Call)]
    assert len(body[-1].reductions) == len(starts) >= 3
    for start in starts[:3]:
        assert sum(call > start for call in calls) >= 2
    assert not any(isinstance(each, Wait) for each in body)


@pytest.mark.usefixtures("small_buckets")
def test_the_timeline_shows_what_runs_while_gradients_are_reduced() -> None:
    model, x = layers()
    lines = meshwright.compile(model, PLAN, x).timeline().splitlines()
    backward = lines[lines.index("stage0.backward") :]
    starts = [i for i, line in enumerate(backward) if line.startswith("┌")]
    ends = [i for i, line in enumerate(backward) if "under way" in line]
    first = starts[0]
    assert "all_reduce[dp]" in backward[first]
    assert len(ends) >= 3 and ends == list(range(ends[0], len(backward)))
    assert all(line.startswith("│") for line in backward[first + 1 : ends[0]])
    assert ends[0] - first > 10


def test_a_reduction_with_nothing_left_to_do_is_waited_for_at_once() -> None:
    model, x = layers()
    body = backward(meshwright.compile(model, PLAN, x))
    assert isinstance(body[-3], Exchange) and isinstance(body[-1], Return)
    assert body[-1].reductions == ()


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_reduced_under_way_are_those_of_the_model(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transport may overwrite a bucket with its sum, or give the sum in other memory."""
    if not in_place:
        monkeypatch.setattr(virtual, "everyone", lambda wire, given, _: everyone(wire, given))
    model, x = layers()
    run = meshwright.compile(model, PLAN, x).launch()
    for _ in range(2):
        run.step(x)
        model(x).backward()
    for name, gradient in run.gradients().items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


@pytest.mark.usefixtures("small_buckets")
def test_values_live_from_where_they_are_made_to_their_last_use() -> None:
    model, x = layers()
    for each in meshwright.compile(model, PLAN, x).instructions:
        alive = set(each.inputs)
        used: dict[Variable, int] = {}
        for i, instruction in enumerate(each.body):
            found = {value for value in reads(instruction) if isinstance(value, Variable)}
            assert found <= alive, instruction
            made = target(instruction)
            used |= dict.fromkeys(found | ({made} if made else set()), i)
            alive |= {made} if made else set()
            if isinstance(instruction, Free):
                freed = set(instruction.variables)
                assert freed <= alive and {used[v] for v in freed} == {i - 1}
                alive -= freed


def test_what_is_under_way_is_returned_once_and_read_nowhere() -> None:
    model, x = layers()
    forward = meshwright.compile(model, PLAN, x).instructions[0].body
    loss = forward[-1].results[0]
    assert isinstance(loss, UnderWay)
    assert [i for i, each in enumerate(forward) if loss.handle in reads(each)] == [len(forward) - 1]


def test_every_line_of_code_knows_its_node() -> None:
    model, x = layers()
    program = meshwright.compile(model, PLAN, x)
    for code, each in zip(program.code, program.instructions, strict=True):
        assert len(code.nodes) == len(code.source.splitlines())
        named = {node.name for node in code.nodes if node is not None}
        made = (i for i in each.body if isinstance(i, (Call, Copy, Exchange)))
        assert {instruction.node.name for instruction in made} <= named


class Masked(nn.Module):
    """Has a constant that is not finite, and gives its loss under another name too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        masked = self.up(x).masked_fill(x > 1.0, float("-inf"))
        loss = masked.softmax(-1).square().mean()
        return {"loss": loss, "again": loss}


def test_constants_may_be_infinite_and_one_value_returned_twice() -> None:
    model, x = Masked(), torch.randn(4, 8)
    run = meshwright.compile(model, PLAN, x).launch()
    wanted = model(x)["loss"].detach()
    torch.testing.assert_close(torch.as_tensor(run.step(x)), wanted)
    torch.testing.assert_close(run.forward(x)["again"], wanted)


def test_factories_and_moves_between_devices_are_given_the_device_of_the_rank() -> None:
    builder, aten = Builder("step.forward", Mesh(())), torch.ops.aten
    kind, whole = TensorType((4,), torch.float32), replicated((4,))
    x = builder.emit(INPUT, ("argument", "x"), type=kind, layout=whole)
    calls = [
        (aten.ones.default, ((4,),), {}),
        (aten._to_copy.default, (x,), {"device": torch.device("cuda")}),
        (aten._to_copy.default, (x,), {"dtype": torch.float32}),
    ]
    made = [builder.emit(*call, type=kind, layout=whole) for call in calls]
    graph = builder.graph(Output(OutputKind.OUTPUT, str(i), node) for i, node in enumerate(made))
    given = [each.kwargs for each in lowered(graph).body if isinstance(each, Call)]
    assert ["device" in kwargs for kwargs in given] == [True, True, False]


@pytest.mark.parametrize(
    ("also", "returned"), [((), False), ((torch.ops.aten.neg.default,), False), ((), True)]
)
def test_a_gradient_is_computed_in_its_bucket_where_nothing_else_takes_it(
    also: Any, returned: bool
) -> None:
    builder, aten = Builder("step.backward", Mesh((("dp", 2),))), torch.ops.aten
    kind, whole = TensorType((4, 4), torch.float32), replicated((4, 4))
    pending = whole.add_partial(["dp"])
    x = builder.emit(INPUT, ("argument", "x"), type=kind, layout=whole.add_varying(["dp"]))
    gradient = builder.emit(aten.mm.default, (x, x), type=kind, layout=pending)
    type, flat = bucket_type((gradient,), kind.dtype, builder.mesh)
    made = [builder.emit(BUCKET, (gradient,), type=type, layout=flat)]
    made += [builder.emit(op, (gradient,), type=kind, layout=pending) for op in also]
    made += [gradient] * returned
    graph = builder.graph(Output(OutputKind.OUTPUT, str(i), node) for i, node in enumerate(made))
    body = lowered(graph).body
    (product,) = (each for each in body if isinstance(each, Call) and each.node is gradient)
    copied = any(isinstance(each, Copy) for each in body)
    assert (product.out is None) == copied == (bool(also) or returned)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 4, padding_idx=3)

    def forward(self, index: Tensor) -> Tensor:
        return self.table(index).square().sum()


@pytest.mark.parametrize("plan", ["data index over dp\n", "data index over dp\naccumulate 2\n"])
def test_the_gradient_of_a_table_is_added_up_where_it_is_kept(plan: str) -> None:
    torch.manual_seed(0)
    model, index = Lookup(), torch.randint(0, 8, (8, 3))
    index[0] = torch.tensor([3, 5, 5])
    program = meshwright.compile(model, meshwright.Plan.parse(f"mesh dp=2\n{plan}"), (index,))
    assert "embedding_backward" in "".join(code.source for code in program.code)
    for code in program.code:
        assert not any("= _embedding_backward" in line for line in code.source.splitlines())
    run = program.launch()
    model(index).backward()
    for number in (1, 2):
        run.step(index)
        expected = number * model.table.weight.grad
        torch.testing.assert_close(run.gradients()["table.weight"], expected)
