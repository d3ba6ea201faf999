"""Sequential axes: their coordinates run one after the other on every rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import INPUT, Phase
from meshwright.compiler.graph.transfers import moves
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.public import Program
from meshwright.runtime.executor import Executor
from tests.equivalence import Comparison, check_equal, implicit_gathers
from tests.models import GPT_TENSOR, Gpt, Mlp, real, rows, tokens
from tests.passes.examples import Body


def compiled(model: nn.Module, example: tuple[Tensor, ...], plan: str) -> Program:
    parsed = meshwright.Plan.parse(plan)
    return meshwright.compile(model.double(), parsed, example=example)


PLANS = {
    "data": "mesh dp=2\ndata tokens, targets over dp\naccumulate 4\n",
    "micro alone": "mesh dp=1\ndata tokens, targets over dp\naccumulate 4\n",
    "tensor": "mesh tp=2\ndata tokens, targets\naccumulate 2\n" + GPT_TENSOR,
    "sequence": "mesh dp=2, tp=2\ndata tokens, targets over dp\naccumulate 2\n"
    + GPT_TENSOR
    + "sequence blocks.* over tp\nvocab wte, head over tp\n",
}


@pytest.mark.parametrize("name", PLANS)
def test_a_gpt_in_microbatches_trains_as_on_one_device(name: str) -> None:
    torch.manual_seed(0)
    check_equal(Gpt(), tokens, PLANS[name])


@pytest.mark.parametrize(
    ("level", "gathers", "scatters"),
    [(1, Phase.BEFORE, Phase.AFTER), (2, Phase.BEFORE, Phase.BACKWARD)],
)
@pytest.mark.parametrize("name", ["data", "sequence"])
def test_weights_are_gathered_once_and_gradients_scattered_when_the_level_says(
    name: str, level: int, gathers: Phase, scatters: Phase
) -> None:
    program = compiled(Gpt(layers=1), tokens(), PLANS[name] + f"zero {level} over dp\n")
    for phase in program.stages[0].graphs:
        found = kinds(program, phase) - {"all_reduce"}
        wanted = {"all_gather_replicated"} if phase is gathers else set[str]()
        assert found == wanted | ({"reduce_scatter"} if phase is scatters else set())


@pytest.mark.parametrize("name", ["data", "sequence"])
def test_level_three_gathers_and_scatters_in_the_loop(name: str) -> None:
    program = compiled(Gpt(layers=1), tokens(), PLANS[name] + "zero 3 over dp\n")
    assert "all_gather_replicated" in kinds(program, Phase.FORWARD)
    assert kinds(program, Phase.BACKWARD) == {"all_gather_replicated", "reduce_scatter"}
    assert kinds(program, Phase.AFTER) == {"all_reduce"}


def kinds(program: Program, phase: Phase) -> set[str]:
    """The kinds of the collectives over `dp` that the graph of a phase has."""
    nodes = program.stages[0].graphs[phase].nodes
    return {
        str(n.op).removeprefix("mesh::") for n in nodes if moves(n) and "dp" in n.kwargs["axes"]
    }


def test_gradients_are_summed_up_where_they_are_kept() -> None:
    batch = rows()
    program = compiled(Mlp(), batch, "mesh dp=2\ndata x over dp\naccumulate 4\n")
    run = program.launch()
    executor = Executor(program, run.states[0], {})
    assert len(executor.loops[0].places) == len(program.parameters)
    run.step(*batch)
    first = run.gradients()
    run.step(*batch)
    for name, gradient in run.gradients().items():
        assert torch.allclose(gradient, 2 * first[name])


ACTIVATIONS = {
    "glu": lambda: nn.Sequential(nn.GLU(), nn.Linear(8, 16)),
    "prelu of one weight": nn.PReLU,
    "prelu of channels": lambda: nn.PReLU(16),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4, affine=True), nn.Flatten(1)
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_several_operators_run_in_microbatches(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), ACTIVATIONS[name](), nn.Linear(16, 4)).double()
    program = meshwright.compile(
        model,
        meshwright.Plan.parse("mesh dp=2\ndata input over dp\naccumulate 2\n"),
        example=(real(8, 16),),
        loss=lambda output: output.square().sum(),
    )
    run = program.launch()
    batch = real(8, 16)
    loss = model(batch).square().sum()
    loss.backward()
    assert torch.allclose(run.step(batch), loss)
    for parameter, gradient in zip(model.parameters(), run.gradients().values(), strict=True):
        assert torch.allclose(parameter.grad, gradient)


class Absolute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.l1_loss(self.head(x), y)


def test_joining_is_no_cheaper_to_the_placement_than_sending() -> None:
    torch.manual_seed(0)
    plan = "mesh dp=1\ndata x, y over dp\naccumulate 4\n"
    program = check_equal(Absolute(), lambda: (real(8, 16), real(8, 4)), plan)
    assert implicit_gathers(program) == []


def test_dropout_draws_the_same_numbers_in_microbatches() -> None:
    torch.manual_seed(0)
    model, batch = Gpt(p=0.3).double(), tokens()
    losses, gradients = [], []
    for plan in ("mesh dp=2\ndata tokens, targets over dp\n", PLANS["data"]):
        run = compiled(model, batch, plan).launch(seed=5)
        losses.append(run.step(*batch))
        gradients.append(run.gradients())
    assert torch.allclose(losses[0], losses[1], rtol=1e-12, atol=0)
    compare = Comparison(1e-12)
    for name, value in gradients[0].items():
        compare(name, gradients[1][name], value)
    compare.report()


class Scored(nn.Module):
    """Gives what it computes beside the loss, and takes a running maximum over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(torch.tanh(self.up(x)))
        return {"loss": y.square().mean(), "y": y, "largest": y.detach().amax()}


def test_outputs_are_joined_and_maxima_taken_over_microbatches() -> None:
    torch.manual_seed(0)
    plan = "mesh dp=2\ndata x over dp\naccumulate 4\n"
    check_equal(Scored(), rows, plan, outputs=["y", "largest"])


class Shown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Body()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.block(x)
        return {"loss": y.square().mean(), "y": y}


def test_what_the_backward_gathers_again_leaves_the_loop_as_it_was() -> None:
    torch.manual_seed(0)
    plan = """
        mesh tp=2
        data x
        accumulate 2
        columns block.up over tp
        rows block.down over tp
        sequence block over tp
        """
    check_equal(Shown(), lambda: (real(8, 16, 16),), plan, outputs=["y"])


def test_a_run_in_microbatches_evaluates_and_gives_outputs() -> None:
    torch.manual_seed(0)
    model, (x,) = Scored().double(), rows()
    run = compiled(model, (x,), "mesh dp=2\ndata x over dp\naccumulate 2\n").launch()
    wanted = model(x)
    assert torch.allclose(run.evaluate(x), wanted["loss"])
    assert torch.allclose(run.forward(x)["y"], wanted["y"])


def test_gradients_are_added_to_across_steps_of_microbatches() -> None:
    torch.manual_seed(0)
    plan = "mesh dp=2\ndata x over dp\naccumulate 2\n"
    check_equal(Mlp(), rows, plan, accumulate=2)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.bn = nn.Linear(16, 32), nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.up(x)).square().mean()


class Contrasted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).mean(0).exp().sum()


@pytest.mark.parametrize(("model", "module"), [(Normed, "`bn`"), (Contrasted, "the model")])
def test_a_statistic_of_activations_that_is_needed_whole_is_refused(
    model: type[nn.Module], module: str
) -> None:
    with pytest.raises(
        LayoutError, match="depends on parameters, and is needed whole in the loop over `micro`"
    ) as error:
        compiled(model(), rows(), "mesh dp=1\ndata x over dp\naccumulate 2\n")
    assert f"in {module} depends" in str(error.value)


class Scaled(nn.Module):
    """A statistic of one stage that a later one takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mean = h.mean()
        return (self.b(h) * mean).square().mean()


def test_a_statistic_that_another_stage_takes_is_named_where_it_is_computed() -> None:
    with pytest.raises(LayoutError, match="`div` in the model depends on parameters"):
        compiled(Scaled(), rows(), "mesh pp=2\ndata x\nstages at b over pp microbatches=2\n")


def test_the_label_count_is_reduced_once_before_the_loop() -> None:
    program = compiled(Gpt(), tokens(), PLANS["data"])
    assert program.comm().counts() == {"all_reduce[dp]": 3}
    kinds = [action.kind for action in program.entries[0]]
    loop = [Phase.FORWARD, Phase.BACKWARD] * 4
    assert kinds == [*[Phase.COUNT] * 4, Phase.BEFORE, *loop, Phase.AFTER]
    parameters = [n for n in program.stages[0].graphs[Phase.COUNT].nodes if n.requires_grad]
    assert all(node.op == INPUT for node in parameters)


def test_a_program_in_microbatches_has_the_ranks_of_its_other_axes() -> None:
    program = compiled(Mlp(), rows(), "mesh dp=2\ndata x over dp\naccumulate 4\n")
    assert program.mesh == Mesh((("dp", 2),))
    assert sorted(program.entries) == [0, 1]


def test_a_sequential_axis_has_no_ranks_and_no_groups() -> None:
    mesh = Mesh((("dp", 2), ("micro", 3), ("tp", 2)), frozenset({"micro"}))
    assert mesh.num_ranks == 4 and mesh.size(("dp", "micro")) == 6
    assert mesh.coords(3) == {"dp": 1, "tp": 1} and mesh.rank({"dp": 1, "tp": 0}) == 2
    assert mesh.group(0, ("dp", "micro")) == (0, 2)
    assert mesh.turns == ({"micro": 0}, {"micro": 1}, {"micro": 2})
    assert mesh.of_ranks == Mesh((("dp", 2), ("tp", 2)))
    assert str(mesh) == "dp=2, micro=3 (sequential), tp=2"
