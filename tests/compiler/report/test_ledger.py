"""What a program says that ranks send is what they send, rank by rank, to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.costs.volume import bytes_sent
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Start
from meshwright.compiler.public import Program
from meshwright.compiler.report.summary import summarise
from meshwright.dsl.errors import PlanError
from tests.compiler.report.memory.test_peaks import STAGED
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, real, tokens

FOUR = f"mesh pp=4\ndata tokens, targets\n{STAGED['four']}\n"


def compiled(model: nn.Module, plan: str, example: Any, **options: Any) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan, "gpt.plan"), example, **options)


def counted(
    program: Generator[Any, Any, Any], rank: int, mesh: Mesh, sent: Counter[tuple[str, int]]
) -> Generator[Any, Any, Any]:
    """The same program; what it sends is added up by axes and rank."""
    answer: Any = None
    while True:
        try:
            request = program.send(answer)
        except StopIteration as stop:
            return stop.value
        wire, tensor = None, None
        if isinstance(request, Start):
            wire, tensor = request.wire, request.tensor
        elif isinstance(request, tuple):
            wire, tensor, *_ = request
        if wire is not None and (wire.ends is None or wire.members(mesh, rank)[0] == rank):
            size = bytes_sent(wire, tensor.numel(), tensor.element_size(), mesh)
            sent[", ".join(wire.axes), rank] += size
        answer = yield request


def check(program: Program, example: Any) -> None:
    sent: Counter[tuple[str, int]] = Counter()
    run = program.launch(check_inputs=False)
    transport = run.transport.run
    run.transport.run = lambda programs, names=(): transport(
        [counted(each, rank, program.mesh, sent) for rank, each in enumerate(programs)], names
    )
    run.step(*example)
    comm = program.comm().by_place()
    for rank in range(program.mesh.num_ranks):
        found = {axes: size for (axes, each), size in sent.items() if each == rank}
        assert comm[program.place(rank)].bytes_by_axis() == found


@pytest.mark.parametrize(
    "plan",
    [
        FOUR,
        f"mesh pp=2, dp=2\n{GPT_DATA}{STAGED['1f1b']}\nzero 1 over dp\n",
        f"mesh pp=2, dp=2\n{GPT_DATA}{STAGED['zbv']}\nzero 2 over dp\n",
        f"mesh dp=2, pp=2\n{GPT_DATA}{STAGED['interleaved']}\nzero 3 over dp\n",
        f"mesh pp=2, tp=2\n{GPT_TENSOR}{STAGED['whole batch']}\nvocab wte, head over tp\n",
    ],
    ids=["four", "zero 1", "zero 2", "zero 3", "tensor"],
)
def test_the_bytes_of_every_stage_are_those_that_are_sent(plan: str) -> None:
    check(compiled(Gpt(layers=4), plan, tokens()), tokens())


class Masked(nn.Module):
    """A mask of two stages, and a value that one stage makes and the last takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        keep = (x > 0).all(-1, keepdim=True).to(x)
        first = self.a(x)
        h = torch.tanh(self.b(first)) * keep
        return (torch.tanh(self.c(h)) * keep + first).square().mean()


def test_what_is_relayed_and_what_is_computed_again_are_told_apart() -> None:
    example = (real(8, 8),)
    program = compiled(Masked().double(), "mesh pp=3\nstages at b, c over pp\n", example)
    check(program, example)
    summary = summarise(program)
    assert (0, 1, 2) in [path for row in summary.passed for path in row.paths]
    assert (2, 1, 0) not in [path for row in summary.passed for path in row.paths]
    assert [(row.type, row.stages) for row in summary.repeated] == [("f64[8, 1]", (1, 2))]
    assert [part.modules for part in summary.stages] == [("a",), ("b",), ("c",)]


def test_transfers_have_their_stages_and_the_line_of_the_plan() -> None:
    comm = compiled(Gpt(layers=4), FOUR, tokens()).comm()
    sent = [item for item in comm if item.kind == "transfer"]
    assert {item.plan_line for item in sent} == {"gpt.plan:3"}
    assert {item.axes for item in sent} == {("pp",)}
    found = {(item.phase, item.at, item.stages, item.times) for item in sent if item.times > 1}
    ahead = {("forward", f"pp={k}", (k, k + 1), 4) for k in range(3)}
    assert found == ahead | {("backward", f"pp={k}", (k, k - 1), 4) for k in (1, 2, 3)}
    assert comm.under("blocks.1").counts() == {"transfer[pp]": 4}


def test_contracts_hold_for_the_rank_that_sends_most() -> None:
    middle = 2 * 4 * (2 * 8 * 24 * 4)
    for bound in ("transfer[pp] <= 5", f"bytes[pp] == {middle} step"):
        compiled(Gpt(layers=4), f"{FOUR}expect {bound}\n", tokens())
    with pytest.raises(PlanError, match=r"the program has transfer\[pp\] of 5, not <= 4"):
        compiled(Gpt(layers=4), f"{FOUR}expect transfer[pp] <= 4\n", tokens())
    compiled(Gpt(layers=4), f"{FOUR}expect transfer[pp] == 1 forward per blocks.1\n", tokens())


def test_an_explanation_says_the_stage_and_the_ways_of_a_tied_weight() -> None:
    program = compiled(Gpt(layers=4), FOUR, tokens())
    assert program.explain("blocks.1").stages == program.explain("blocks.1.up").stages == (1,)
    tied = program.explain("wte.weight")
    assert tied.tensors[0].at == "pp=0"
    assert {(each.phase, each.stages) for each in tied.collectives} == {
        ("forward", (0, 3)),
        ("backward", (3, 0)),
    }
