"""The pass `zero` in pipelines: what ranks gather, reduce and send, and when."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.graph.ir import InputKind, Phase
from meshwright.passes import driver
from meshwright.runtime.machine import RUNTIME
from tests.equivalence import check_equal

DATA = "mesh dp=2, pp=2\ndata ids, targets over dp\n"
TWO = DATA + "stages at blocks.2 over pp microbatches=4"
FOUR = DATA + "stages at blocks.1, blocks.2, blocks.3 over pp microbatches=4 virtual=2"
REPLICAS = TWO.replace("dp=2", "a=2, dp=2").replace("over dp", "over (a, dp)")


class Words(nn.Module):
    """A table that the first stage and, if it is tied, the last one use."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def words() -> tuple[Tensor, Tensor]:
    ids, targets = torch.randint(12, (2, 16, 4)).unbind()
    return ids, targets.masked_fill(targets == 3, -100)


@pytest.mark.parametrize(
    "plan",
    [
        f"{TWO}\nzero 1 over dp\n",
        f"{TWO} schedule=zb\nzero 2 over dp\n",
        f"{TWO} schedule=zb\nzero 2 over dp every=microbatch\n",
        f"{TWO}\nzero 3 blocks.* over dp\n",
        f"{FOUR} schedule=interleaved\nzero 3 over dp\n",
        f"{FOUR.replace('=4', '=8')} schedule=zbv\nzero 3 over dp every=microbatch\n",
        f"{FOUR.replace('pp=2', 'pp=4').replace(' virtual=2', '')}\nzero 3 over dp\n",
        f"{TWO.replace(' microbatches=4', '')}\nzero 3 over dp\n",
        f"{REPLICAS}\nzero 3 over dp every=microbatch\n",
        f"{REPLICAS}\nzero 2 over dp\n",
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_pipeline_trains_as_on_one_device(plan: str, tied: bool) -> None:
    torch.manual_seed(0)
    check_equal(Words(tied), words, plan, steps=2)


def test_what_is_gathered_and_scattered_once_per_step_does_not_grow_with_microbatches() -> None:
    source = driver.capture(Words(tied=False).double(), words())
    for every, level in (("", 1), ("", 2), ("", 3), ("microbatch", 2), ("microbatch", 3)):
        for m in (2, 4):
            plan = TWO.replace("=4", f"={m}") + f"\nzero {level} over dp"
            plan += f" every={every}\n" if every else "\n"
            program = driver.compile_captured(source, meshwright.Plan.parse(plan), runtime=RUNTIME)
            sent = Counter[str]()
            for each in program.comm():
                sent[each.kind] += each.bytes * each.times
            held = program.parameters.values()
            whole = 8 * sum(math.prod(s.layout.local_shape(program.mesh)) for s in held)
            # The backward takes no bias, and of the table only the indices.
            once = 8 * (12 * 8 + 4 * 8) // 2
            gathered = m * (2 * whole - once) if (every, level) == ("microbatch", 3) else whole
            assert sent["all_gather"] == gathered, plan
            assert sent["reduce_scatter"] == (m * whole if every else whole), plan


@pytest.mark.parametrize(
    "plan",
    [
        f"{TWO}\nprecision bf16 reduce=bf16\nzero 2 over dp every=microbatch\n",
        f"{REPLICAS} schedule=zb\nzero 3 over dp every=microbatch\n",
        "mesh dp=2\ndata ids, targets over dp\naccumulate 2\nprecision bf16\nzero 2 over dp\n",
    ],
    ids=["pipeline", "replicas", "accumulate"],
)
def test_each_microbatch_scatters_every_gradient_that_ranks_keep_in_parts(plan: str) -> None:
    """That of a tied weight, too, which has shares of several stages, and of another type."""
    program = meshwright.compile(Words(), meshwright.Plan.parse(plan), words())
    phases = {
        phase
        for stage in program.stages
        for phase, graph in stage.graphs.items()
        if any(str(node.op) == "mesh::reduce_scatter" for node in graph.nodes)
    }
    assert phases and not any(phase.once for phase in phases)


@pytest.mark.parametrize(
    ("plan", "there", "back"),
    [
        (TWO, "f64[12, 8] varying(dp)", "f64[12, 8] partial(dp)"),
        (f"{TWO}\nzero 3 over dp", "f64[12@dp, 8]", "f64[12@dp, 8]"),
        (f"{REPLICAS}\nzero 3 over dp", "f64[12@dp, 8] varying(a)", "f64[12@dp, 8] partial(a)"),
    ],
    ids=["data", "zero", "replicas"],
)
def test_the_gradient_of_a_tied_weight_is_reduced_by_its_owner(
    plan: str, there: str, back: str
) -> None:
    example = words()
    program = meshwright.compile(
        Words().double(), meshwright.Plan.parse(plan + "\n"), example=example
    )
    first, last = program.stages
    for stage, phase, text in ((last, Phase.BEFORE, there), (first, Phase.AFTER, back)):
        lines = str(program.graph(stage.graphs[phase].name)).splitlines()
        assert any("input(received" in line and f": {text} " in line for line in lines), lines
    reduced = [
        each for each in program.comm() if each.kind == "all_reduce" and "[]" not in each.type
    ]
    assert len(reduced) == (0 if "zero" in plan and plan.startswith(TWO) else 2)


def test_a_stage_takes_the_inputs_that_it_uses() -> None:
    example = words()
    program = meshwright.compile(Words(), meshwright.Plan.parse(TWO + "\n"), example=example)
    given = [
        {n.args[1] for n in stage.forward.inputs if n.args[0] == InputKind.ARGUMENT}
        for stage in program.stages
    ]
    assert given == [{"ids"}, {"targets"}]
    assert [node.args[1] for node in program.inputs()] == ["ids", "targets"]
    for stage in program.stages:
        for phase, graph in stage.graphs.items():
            used = {n for node in graph.nodes for n in node.operands()} | graph.returned
            assert phase is Phase.FORWARD or used.issuperset(graph.inputs)
