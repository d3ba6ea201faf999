"""`checkpoint budget=SIZE`: the least that is computed again so that a rank stays within it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.graph.flops import flops
from meshwright.compiler.graph.ir import GETITEM
from meshwright.compiler.public import Program
from meshwright.compiler.report.recompute import recomputed, share_recomputed
from meshwright.compiler.report.sheets import heading
from meshwright.compiler.report.summary import summarise
from meshwright.dsl.errors import PlanError
from meshwright.dsl.statements import Checkpoint
from meshwright.dsl.writing.printer import cells
from meshwright.passes.budgets import recompute
from meshwright.passes.budgets.choice import Gap, Kind, Options, Place, Problem, ordered
from meshwright.passes.budgets.problem import OnPaper, on_paper
from meshwright.passes.budgets.windows import memory_of
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens

MODEL, BATCH = Gpt(p=0.2, layers=4), tokens()
STAGES = "stages at blocks.2 over pp microbatches=4\n"
BASES = {
    "data": f"mesh dp=2\n{GPT_DATA}",
    "tensor": f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}sequence blocks.* over tp\n",
    "zero": f"mesh dp=2\n{GPT_DATA}zero 3 over dp\naccumulate 2\nprecision bf16\n",
    "pipeline": f"mesh pp=2\ndata tokens, targets\n{STAGES}",
    "copies": f"mesh pp=2\ndata tokens, targets\n{STAGES.strip()} schedule=dualpipe\n",
}


def compiled(plan: str, model: nn.Module = MODEL, batch: tuple[Tensor, ...] = BATCH) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), batch)


def peak(program: Program) -> int:
    return max(each.peak for each in program.memories().values())


def statements(program: Program) -> str:
    assert program.budgeted is not None
    return "".join(f"{each}\n" for each in program.budgeted.statements)


def again(program: Program) -> int:
    """The operations of what is computed again."""
    return sum(each.flops for each in recomputed(program))


@pytest.mark.parametrize(
    "base",
    [
        *(BASES[name] for name in ("tensor", "pipeline")),
        *(pytest.param(BASES[name], marks=pytest.mark.slow) for name in ("data", "zero", "copies")),
    ],
)
def test_a_rank_stays_within_the_budget_and_computes_no_more_again_than_in_every_block(
    base: str,
) -> None:
    every = compiled(base + "checkpoint blocks.*\n")
    program = compiled(f"{base}checkpoint budget={peak(every)}B\n")
    found = program.budgeted
    assert found is not None
    assert found.peak == peak(program) <= found.budget < found.without
    assert found.bound <= found.operations
    assert again(program) <= again(every)


@pytest.mark.slow
def test_what_was_chosen_is_a_plan_that_gives_the_same_program() -> None:
    base = BASES["tensor"]
    middle = (peak(compiled(base)) + peak(compiled(base + "checkpoint blocks.*\n"))) // 2
    program = compiled(f"{base}checkpoint budget={middle}B\n")
    pasted = compiled(base + statements(program))
    assert statements(program) and pasted.budgeted is None
    assert peak(pasted) == peak(program)
    assert [*map(str, pasted.graphs().values())] == [*map(str, program.graphs().values())]
    chosen = program.budgeted
    assert chosen is not None
    lines = heading(summarise(program))
    assert lines[-len(chosen.statements) :] == chosen.statements
    assert "chosen for a budget of" in "".join(lines)


@pytest.mark.slow
def test_results_are_those_of_a_step_that_saves_everything() -> None:
    base = BASES["zero"]
    every = compiled(base + "checkpoint blocks.*\n")
    found = []
    for line in ("", f"checkpoint budget={peak(every)}B\n"):
        run = compiled(base + line).launch(seed=3)
        found.append([run.step(*BATCH), *run.gradients().values(), run.evaluate(*BATCH)])
    assert all(map(torch.equal, *found))


def test_a_budget_that_is_large_enough_computes_nothing_again() -> None:
    whole = peak(compiled(BASES["data"]))
    program = compiled(f"{BASES['data']}checkpoint budget={whole}B\n")
    assert statements(program) == ""
    assert share_recomputed(program) == 0
    smaller = compiled(f"{BASES['data']}checkpoint budget={whole - 1}B\n")
    assert statements(smaller) and peak(smaller) < whole


@pytest.mark.parametrize("base", ["data", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_the_budget_that_an_error_names_can_be_kept(base: str) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(BASES[base] + "checkpoint budget=1KiB\n")
    (least,) = re.findall(r"`(budget=\S+)` or more", caught.value.help)
    assert caught.value.code == "P504"
    assert "backward" in caught.value.subject[0]
    found = compiled(f"{BASES[base]}checkpoint {least}\n").budgeted
    assert found is not None and found.peak <= found.budget < 1.01 * found.peak


def test_a_selector_limits_what_may_be_computed_again_and_statements_hold() -> None:
    base = BASES["data"]
    some = compiled(base + "checkpoint blocks.[2:4]\n")
    program = compiled(f"{base}checkpoint blocks.[2:4] budget={peak(some)}B keep=[attention]\n")
    assert "blocks.0" not in statements(program) and "attention" in statements(program)
    beside = f"checkpoint blocks.0\ncheckpoint budget={peak(some)}B\n"
    again = {
        node.origin.region
        for graph in compiled(base + beside).graphs().values()
        for node in graph.nodes
    }
    assert "blocks.0" in again


def test_where_statements_leave_nothing_to_choose_the_budget_is_kept_without_or_not() -> None:
    every = BASES["data"] + "checkpoint blocks.*\ncheckpoint budget={}B\n"
    program = compiled(every.format(1 << 30))
    assert statements(program) == ""
    with pytest.raises(PlanError, match="the least that a rank needs") as caught:
        compiled(every.format(peak(program) - 1))
    assert caught.value.code == "P504" and caught.value.needed == peak(program)  # type: ignore[attr-defined]


def test_a_model_without_repeated_blocks_is_one_region() -> None:
    model = Gpt(layers=1)
    whole = peak(compiled(BASES["data"], model))
    program = compiled(f"{BASES['data']}checkpoint budget={whole - 256}B\n", model)
    assert peak(program) <= whole - 256
    assert len(program.budgeted.statements) == 1  # type: ignore[union-attr]


def test_auto_is_what_the_device_has() -> None:
    shared, alone = (
        compiled(f"{mesh}checkpoint budget=auto\n").budgeted.budget  # type: ignore[union-attr]
        for mesh in (BASES["data"], f"mesh dp=1\n{GPT_DATA}")
    )
    assert 2**28 < shared == alone // 2
    assert "auto" in str(meshwright.Plan.parse("mesh dp=2\ncheckpoint budget=auto\n"))


def test_auto_needs_a_device_that_is_here() -> None:
    plan = meshwright.Plan.parse(BASES["data"] + "checkpoint budget=auto\n")
    with pytest.raises(meshwright.PlanError, match="the memory of a `meta` device, and none is"):
        meshwright.compile(MODEL, plan, BATCH, device="meta")


class Dropped(nn.Module):
    """A layer with two modules of a kind, the last of which leads out of it."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.first, self.last = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.down(self.first(self.up(x).tanh())))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Dropped() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def operations(program: Program) -> int:
    """The operations of what is computed again, of what is no product one for each element."""
    return sum(
        flops(node, graph.mesh) or math.prod(node.layout.local_shape(graph.mesh))
        for graph in program.graphs().values()
        for node in graph.nodes
        if node.origin.region and node.op != GETITEM and memory_of(node) is node
    )


def test_regions_compute_again_what_they_do_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Kind] = []

    def noting(*args: Any) -> OnPaper:
        paper = on_paper(*args)
        found.extend(paper.options[0].kinds)
        return paper

    monkeypatch.setattr(recompute, "on_paper", noting)
    model, batch, plan = Stack(), (torch.randn(64, 16),), "mesh dp=1\ndata x over dp\n"
    compiled(f"{plan}checkpoint budget={peak(compiled(plan, model, batch)) - 1}B\n", model, batch)
    assert (2, ("dropout", "tanh")) in {(kind.length, kind.keep) for kind in found}
    for kind in found:
        if kind.length == 2:
            options = cells(Checkpoint(segments=1, keep=kind.keep))[1:]
            lines = f"checkpoint layers.[1:{1 + kind.length}] {' '.join(options)}\n"
            assert operations(compiled(plan + lines, model, batch)) == kind.cost, lines


def layers(depth: int, statement: str = "") -> Program:
    batch = tuple(torch.randint(48, (64, 8)) for _ in range(2))
    return compiled(f"mesh dp=1\n{GPT_DATA}{statement}", Gpt(layers=depth, d=32), batch)


def activations(program: Program) -> int:
    memory = program.memory()
    return memory.peak - memory.parameters - memory.gradients - memory.optimizer


@pytest.mark.parametrize(
    "depth", [8, *(pytest.param(each, marks=pytest.mark.slow) for each in (16, 32, 64))]
)
def test_no_more_is_computed_again_than_in_segments_of_equal_memory(depth: int) -> None:
    whole = layers(depth)
    parts = layers(depth, f"checkpoint blocks.* segments={round(math.sqrt(depth))}\n")
    chosen = layers(depth, f"checkpoint budget={peak(parts)}B\n")
    assert activations(chosen) <= activations(parts) < 0.75 * activations(whole)
    assert share_recomputed(chosen) < share_recomputed(parts)


def brute(problem: Problem, budget: int) -> int | None:
    """The least cost of all ways to make two modules of each run of regions."""
    (options,) = problem.options
    costs = []
    for one in range(len(options.kinds)):
        for two in range(len(options.kinds)):
            counts = [0] * len(options.kinds)
            counts[one] += 1
            counts[two] += 1
            if problem.peaks((tuple(counts),))[0] <= budget:
                costs.append(problem.cost((tuple(counts),)))
    return min(costs, default=None)


KINDS = ordered(
    [
        Kind(0, (), 90, 100, 0),
        Kind(1, (), 10, 110, 70),
        Kind(1, ("a",), 40, 105, 20),
        Kind(1, ("b",), 60, 95, 11),
        Kind(1, ("c",), 60, 120, 30),
    ]
)


@pytest.mark.parametrize("budget", range(100, 220, 5))
def test_the_integer_program_finds_the_least_of_all_choices(budget: int) -> None:
    problem = Problem((Options(0, 2, KINDS, 5),), (Gap(0, 1, 3),), (Place({0: 1}, 2),))
    expected, found = brute(problem, budget), problem.best(budget)
    assert (found and found.cost) == expected
    if found is not None:
        assert problem.peaks(found.counts)[0] <= budget
    least = problem.peaks(problem.least().counts)[0]
    assert (least <= budget) == (expected is not None)


def test_a_byte_less_than_a_choice_needs_is_another_choice() -> None:
    size = 1 << 36  # in whose millionth part HiGHS sees no difference
    kinds = (Kind(0, (), size, size, 0), Kind(1, ("a",), size // 2, size // 2, 5))
    problem = Problem((Options(0, 4, kinds, 0),), (), (Place({0: 1}, 0),))
    for saved in range(4):
        counts = ((4 - saved, saved),)
        budget = problem.peaks(counts)[0]
        assert problem.best(budget).counts == counts  # type: ignore[union-attr]
        assert problem.best(budget - 1).counts == ((3 - saved, saved + 1),)  # type: ignore[union-attr]


def test_a_kind_that_another_beats_is_no_choice() -> None:
    assert [kind.keep for kind in KINDS] == [(), ("a",), ("b",), ()]
