"""`stages N balance=`: boundaries are chosen on the graph, and said as a statement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.public import Program
from meshwright.compiler.report.memory.prediction import memories
from meshwright.compiler.report.show import show_text
from meshwright.dsl.errors import PlanError
from tests.equivalence import check_equal
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens
from tests.test_equivalence_huggingface import TOLERANCE, llama, t5, text

SPLIT = f"{GPT_TENSOR}sequence blocks.* over tp\nvocab wte, head over tp\n"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def compiled(model: nn.Module, example: Any, plan: str) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), example=example)


def stages(program: Program) -> str:
    """The line of the program's plan that cuts the model."""
    (found,) = (line for line in str(program.plan).splitlines() if line.startswith("stages"))
    return " ".join(found.split())


@pytest.mark.parametrize("by", ["flops", "parameters", "memory"])
def test_what_is_printed_can_be_pasted_and_gives_the_same_program(by: str) -> None:
    plan = f"mesh dp=2, pp=2\nstages 2 over pp balance={by} microbatches=4\n{GPT_DATA}"
    chosen = compiled(Gpt(layers=4), tokens(), plan)
    assert stages(chosen) == "stages at blocks.2 over pp microbatches=4"
    assert stages(chosen) in show_text(chosen)
    assert stages(chosen) in chosen.explain("").statements["<plan>:2"]
    assert f"stages chosen by {by}: the rank that has most has 1.0" in show_text(chosen)
    pasted = compiled(Gpt(layers=4), tokens(), str(chosen.plan))
    assert pasted.digest == chosen.digest
    assert "chosen by" not in show_text(pasted)


TWICE = 2 * "stages 2 over pp microbatches=4\n"
PLANS = {
    "two": f"mesh pp=2\n{TWICE}data tokens, targets\n",
    "four": f"mesh dp=2, pp=4\nstages 4 over pp balance=memory microbatches=2\n{GPT_DATA}",
    "virtual": f"mesh dp=2, pp=2\nstages 4 over pp schedule=interleaved virtual=2 microbatches=4\n"
    f"{GPT_DATA}zero 3 over dp\n",
    "tensor parallel": f"mesh dp=2, pp=2, tp=2\nstages 2 over pp balance=parameters\n"
    f"{GPT_DATA}{SPLIT}",
}


@pytest.mark.parametrize("name", PLANS)
def test_chosen_stages_train_as_one_process_does(name: str) -> None:
    program = check_equal(Gpt(layers=4), tokens(), PLANS[name])
    assert program.balance is not None and program.balance.imbalance < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("make", [llama, t5])
def test_a_hugging_face_model_is_cut_between_its_blocks(
    make: Callable[[], nn.Module], num_stages: int
) -> None:
    example = text()
    plan = f"mesh dp=2, pp={num_stages}\nstages {num_stages} over pp microbatches=2\n"
    plan += f"data {', '.join(example)} over dp\n"
    check_equal(make(), example, plan, tolerance=TOLERANCE, steps=2, outputs=("logits",))


def test_the_bytes_of_parameters_are_those_that_ranks_hold() -> None:
    plan = f"mesh dp=2, pp=2\nstages 2 over pp balance=parameters\n{GPT_DATA}zero 1 over dp\n"
    program = compiled(Gpt(layers=4), tokens(), plan)
    assert program.balance is not None
    held = [
        4 * sum(s.local_bytes(program.mesh) for s in program.parameters.values() if s.held_by(at))
        for at in ({"pp": 0, "dp": 0}, {"pp": 1, "dp": 0})
    ]
    assert list(program.balance.costs) == held


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_bytes_of_memory_are_about_those_that_ranks_need(schedule: str) -> None:
    plan = f"mesh dp=2, pp=4\nstages 4 over pp schedule={schedule} balance=memory microbatches=4\n"
    program = compiled(Gpt(layers=8), tokens(), f"{plan}{GPT_DATA}")
    assert program.balance is not None
    needed = [
        each.parameters + each.gradients + each.optimizer + each.activations
        for each in memories(program).values()
    ]
    assert list(program.balance.costs) == pytest.approx(needed, rel=0.05)


class Wide(nn.Module):
    """Layers whose output head has most of the operations."""

    def __init__(self, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.head = nn.Linear(8, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x).logsumexp(-1).mean()


def test_a_large_output_head_leaves_its_stage_fewer_layers_and_is_not_unnoticed() -> None:
    x = (torch.randn(4, 8),)
    even = compiled(Wide(8, 24), x, "mesh pp=2\nstages 2 over pp\n")
    assert stages(even) == "stages at layers.6 over pp"
    most = compiled(Wide(8, 256), x, "mesh pp=2\nstages 2 over pp\n")
    assert stages(most) == "stages at head over pp"
    assert "the rank that has most has 1.6" in show_text(most)


class Attending(nn.Module):
    """Two values cross inside of each block, and one between them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(8, 8) for name in ("first", "second")})
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["second"](torch.relu(block["first"](x)))
        return x.square().mean()


def test_stages_begin_where_few_bytes_cross() -> None:
    x = (torch.randn(4, 8),)
    program = compiled(Attending(3), x, "mesh pp=2\nstages 2 over pp balance=parameters\n")
    assert stages(program) == "stages at blocks.1.first over pp"


def test_four_stages_of_two_blocks_are_cut_inside_of_them() -> None:
    program = compiled(Attending(2), (torch.randn(4, 8),), "mesh pp=4\nstages 4 over pp\n")
    found = "stages at blocks.0.second, blocks.1.first, blocks.1.second over pp"
    assert stages(program) == found


class Pyramid(nn.Module):
    """Activations that grow smaller, of modules whose names are quoted in a plan."""

    def __init__(self) -> None:
        super().__init__()
        for i, name in enumerate(("stages", "layer-1", "3", "over")):
            self.add_module(name, nn.Linear(32 >> i, 32 >> i + 1))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = torch.relu(module(x))
        return x.square().mean()


def test_activations_that_grow_smaller_are_not_all_left_to_the_first_stage() -> None:
    plan = "mesh pp=4\nstages 4 over pp\n"
    program = compiled(Pyramid(), (torch.randn(4, 32),), plan)
    assert stages(program) == 'stages at "layer-1", "3", "over" over pp'
    half = compiled(Pyramid(), (torch.randn(4, 32),), plan.replace("4", "2"))
    assert stages(half) == 'stages at "layer-1" over pp'


def test_evaluation_has_the_stages_of_training() -> None:
    model = Wide(8, 24)
    x = torch.randn(4, 8)
    program = compiled(model, (x,), "mesh pp=2\nstages 2 over pp balance=memory\n")
    evaluated = program.recompile(model, example=(x,), mode="eval")
    assert stages(evaluated) == stages(program) and evaluated.balance is None
    torch.testing.assert_close(program.launch().evaluate(x), model(x).detach())


class Elementwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.PReLU(), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).sum()


REFUSED = {
    "balance-too-short": (Wide(2, 4), "mesh pp=4\nstages 4 over pp\n"),
    "balance-nothing": (Elementwise(), "mesh pp=2\nstages 2 over pp balance=flops\n"),
    "balance-nothing-said": (Elementwise(), "mesh pp=2\nstages 2 over pp\n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_explained(name: str, golden: Callable[[str, str], None]) -> None:
    model, plan = REFUSED[name]
    with pytest.raises(PlanError) as caught:
        compiled(model, (torch.randn(4, 8),), plan)
    golden(name, str(caught.value))
