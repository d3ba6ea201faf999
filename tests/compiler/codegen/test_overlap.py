"""The order of instructions: early starts, late waits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import meshwright
from meshwright.compiler.codegen.instructions import (
    Call,
    Copy,
    Exchange,
    Free,
    Instruction,
    Pause,
    Return,
    Start,
    Take,
    Variable,
    Wait,
    reads,
    target,
)
from meshwright.compiler.codegen.lowering import lowered
from meshwright.compiler.codegen.overlap import overlap
from meshwright.compiler.graph.ir import (
    INPUT,
    Builder,
    MeshOp,
    Node,
    Output,
    OutputKind,
    TensorType,
)
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.passes import driver
from meshwright.passes.bucket import bucketed
from tests.compiler.layouts import split
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens
from tests.passes.examples import Lm, Mlp, labelled, rows
from tests.passes.statements.blocks.test_stored import stored_split

SEQUENCE = f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}sequence blocks.* over tp\n"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> meshwright.Program:
    """A GPT whose weights are gathered where they are used, each by itself."""
    place = driver.PASSES.index(driver.partition)
    passes = (*driver.PASSES[:place], stored_split, *driver.PASSES[place:])
    monkeypatch.setattr(driver, "PASSES", [each for each in passes if each is not driver.fuse])
    return meshwright.compile(Gpt(layers=2), meshwright.Plan.parse(SEQUENCE), tokens())


def named(body: tuple[Instruction, ...]) -> list[str]:
    """The nodes of what runs, in order; a wait is not shown."""
    kept = (each for each in body if isinstance(each, (Call, Copy, Exchange, Start)))
    return [each.node.name for each in kept]


def calls(body: tuple[Instruction, ...]) -> int:
    return sum(isinstance(each, Call) for each in body)


def test_labels_are_counted_before_all_else() -> None:
    plan = meshwright.Plan.parse("mesh dp=2\ndata tokens, targets over dp\n")
    found = named(meshwright.compile(Lm(), plan, labelled()).instructions[0].body)
    assert found[:3] == ["ne", "sum_1", "all_reduce"]
    assert "embedding" in found[3]


def test_the_same_work_is_left_in_an_order_that_runs(program: meshwright.Program) -> None:
    for graph, each in zip(program.graphs().values(), program.instructions, strict=True):
        before = lowered(graph)
        made = set(each.inputs)
        for instruction in each.body:
            assert {value for value in reads(instruction) if isinstance(value, Variable)} <= made
            if isinstance(variable := target(instruction), Variable):
                assert variable not in made
                made.add(variable)
        assert Counter(named(each.body)) == Counter(named(before.body))


def test_collectives_are_named_by_the_numbers_of_their_wires(program: meshwright.Program) -> None:
    names = [name for code in program.code for name in code.wire_names]
    for each in program.instructions:
        for instruction in each.body:
            if isinstance(instruction, (Start, Wait)):
                assert names[instruction.exchange.wire.index] == instruction.node.name


def test_a_weight_is_gathered_while_the_one_before_is_used(program: meshwright.Program) -> None:
    for each in program.instructions:
        weights = {v for v, node in each.inputs.items() if node.args[0] == "parameter"}
        starts: list[int] = []
        waits: dict[Variable, int] = {}
        for i, instruction in enumerate(each.body):
            if isinstance(instruction, Start) and instruction.exchange.source in weights:
                starts.append(i)
            elif isinstance(instruction, Wait):
                waits[instruction.handle] = i
        ends = [waits[target(each.body[start])] for start in starts]
        assert len(starts) >= 14 and not calls(each.body[: starts[0]])
        pairs = list(zip(starts, ends, strict=True))
        assert all(start < end for start, end in zip(starts[1:], ends, strict=False))
        assert sum(calls(each.body[start:end]) > 0 for start, end in pairs) > 10
        # A norm takes two weights, beside the one that is gathered ahead.
        assert all(sum(start <= i < end for start, end in pairs) <= 3 for i in starts)


def test_an_exchange_starts_where_its_operand_is_made() -> None:
    plan = meshwright.Plan.parse(f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}")
    body = meshwright.compile(Gpt(layers=2), plan, tokens()).instructions[-1].body
    under_way: list[int] = []
    for i, each in enumerate(body):
        if isinstance(each, (Start, Exchange)):
            since = [other for other in body[:i] if isinstance(other, (Call, Copy))]
            exchange = each.exchange if isinstance(each, Start) else each
            assert target(since[-1]) == exchange.source or exchange.into
        if isinstance(each, Wait):
            (start,) = (j for j in range(i) if body[j] == Start(each.handle, each.exchange))
            under_way.append(calls(body[start:i]))
    assert sum(count >= 3 for count in under_way) == 4, "the cotangents of two columns per layer"


def test_a_bucket_is_reduced_as_soon_as_its_last_gradient_is_there() -> None:
    plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp\n")
    body = meshwright.compile(Mlp(), plan, example=rows()).instructions[-1].body
    (reduced,) = (i for i, each in enumerate(body) if isinstance(each, Exchange) and each.into)
    before = [each for each in body[:reduced] if not isinstance(each, Free)]
    assert isinstance(before[-1], (Call, Copy)) and before[-1].out is not None


def test_what_is_gathered_again_is_gathered_where_it_is_read(program: meshwright.Program) -> None:
    body = program.instructions[-1].body
    taken = {each.target for each in body if isinstance(each, Take)}
    again = [
        calls(body[:i])
        for i, each in enumerate(body)
        if isinstance(each, (Start, Exchange)) and set(reads(each)) <= taken
    ]
    assert len(again) >= 4 and min(again) > 0 and len(set(again)) == len(again)


def gathered_twice(*returned: str) -> tuple[Instruction, ...]:
    """The instructions that return these: `other`, computed from an input, `whole`, the input after
    two gathers, and `last`, computed from that."""
    builder, neg = Builder("step.forward", Mesh((("dp", 2), ("tp", 2)))), torch.ops.aten.neg.default
    kind, rows = TensorType((4, 4), torch.float32), split((4, 4), {0: ("tp",)})
    gather, given = MeshOp("all_gather_replicated"), ("argument", "x")
    x = builder.emit(INPUT, given, type=kind, layout=split((4, 4), {0: ("tp",), 1: ("dp",)}))
    part = builder.emit(gather, (x,), {"axes": ("dp",)}, type=kind, layout=rows)
    other = builder.emit(neg, (x,), type=kind, layout=x.layout)
    whole = builder.emit(gather, (part,), {"axes": ("tp",)}, type=kind, layout=replicated((4, 4)))
    last = builder.emit(neg, (whole,), type=kind, layout=whole.layout)
    made = {"other": other, "whole": whole, "last": last}
    graph = builder.graph(Output(OutputKind.OUTPUT, name, made[name]) for name in returned)
    return tuple(each for each in overlap(lowered(graph)).body if not isinstance(each, Free))


def test_a_result_is_waited_for_where_it_is_read_by_another_exchange_too() -> None:
    found = [type(each) for each in gathered_twice("other", "last")]
    assert found == [Exchange, Start, Call, Wait, Call, Return]


def test_what_is_returned_after_more_steps_is_waited_for() -> None:
    *_, waited, returned = gathered_twice("other", "whole")
    assert isinstance(waited, Wait) and waited.exchange.after
    assert isinstance(returned, Return) and returned.results[1] == waited.exchange.target


def test_what_is_made_of_a_scatter_stays_behind_it_where_a_third_begins() -> None:
    """The third scatter sends a product of the first one's result, which something else reads."""
    builder, aten = Builder("step.forward", Mesh((("tp", 2),))), torch.ops.aten
    kind, rows = TensorType((4, 4), torch.float32), split((4, 4), {0: ("tp",)})
    whole = replicated((4, 4))
    pending = whole.add_partial(("tp",))

    def scattered(value: Node) -> Node:
        op = MeshOp("reduce_scatter")
        return builder.emit(op, (value,), {"axes": ("tp",)}, type=kind, layout=rows)

    x = builder.emit(INPUT, ("argument", "x"), type=kind, layout=whole)
    a, b = (
        scattered(builder.emit(op, (x,), type=kind, layout=pending))
        for op in (aten.neg.default, aten.abs.default)
    )
    product = builder.emit(aten.mm.default, (a, a), type=kind, layout=pending)
    c = scattered(product)
    more = builder.emit(aten.neg.default, (product,), type=kind, layout=pending)
    outputs = (Output(OutputKind.OUTPUT, each.name, each) for each in (b, c, more))
    found = named(overlap(lowered(builder.graph(outputs))).body)
    assert found.index(product.name) < found.index(more.name)


@pytest.mark.parametrize(
    "plan",
    [
        f"mesh dp=2, pp=2\n{GPT_DATA}precision bf16 reduce=bf16\n",
        f"mesh dp=2, tp=2, pp=2\n{GPT_DATA}{GPT_TENSOR}",
    ],
)
def test_what_a_stage_runs_once_starts_all_exchanges_before_it_pauses(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes of one, such as a cast, waits for it after the pause, and none starts there."""
    monkeypatch.setitem(bucketed.__kwdefaults__, "limit", 1)
    stages = "stages at blocks.1, blocks.2, blocks.3 over pp microbatches=4"
    text = f"{plan}{stages} schedule=interleaved virtual=2\nzero 1 over dp\n"
    program = meshwright.compile(Gpt(layers=4), meshwright.Plan.parse(text), tokens())
    bodies = [each.body for each in program.instructions if Pause() in each.body]
    assert len(bodies) > 2
    for body in bodies:
        place = body.index(Pause())
        assert not any(isinstance(each, (Wait, Exchange)) for each in body[:place])
        assert not any(isinstance(each, (Start, Exchange)) for each in body[place:])
