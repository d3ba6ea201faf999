"""Mixtures of experts under a plan, and the same model with every expert applied to every token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.public import Program
from meshwright.runtime.errors import OverfullError
from tests.equivalence import Comparison, check_trained, implicit_gathers
from tests.passes.experts.dense import Model, batch, dense


def check_dense(
    plan: str,
    *,
    model: nn.Module | None = None,
    sample: Callable[[], tuple[Tensor, Tensor]] = lambda: batch(8, 6),
    steps: int = 1,
) -> Program:
    """Assert that training under the plan is training with masked experts: losses, gradients,
    parameters and metrics."""
    torch.manual_seed(0)
    model = (model or Model(1)).double()
    batches = [sample() for _ in range(steps)]
    program = meshwright.compile(model, meshwright.Plan.parse(plan), example=batches[0])
    check_trained(program, dense(program.model), batches, compare=Comparison(1e-10))
    assert implicit_gathers(program) == []
    _check_metrics(program, batches[0])
    return program


def _check_metrics(program: Program, sample: tuple[Tensor, Tensor]) -> None:
    run, reference = program.launch(), dense(program.model)
    run.step(*sample)
    reference(*sample)
    found = run.metrics()
    assert found
    for name, values in found.items():
        wanted = reference.get_submodule(name).found
        for key, value in values.items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-10)


def split(mesh: str, data: str, over: str, count: int = 4) -> str:
    """A plan with these axes, some of which split the batch and some the experts."""
    mixed = f"experts blocks.*.mlp over {over} count={count} weight=0.1"
    return f"mesh {mesh}\ndata x, labels over {data}\n{mixed}"


PLANS = {
    "1 rank": split("dp=1", "dp", "dp"),
    "2 ranks": split("dp=2", "dp", "dp"),
    "4 ranks": split("dp=4", "dp", "dp"),
    "8 ranks": split("dp=8", "dp", "dp", 8),
    "part of data": split("dp=2, ep=2", "(dp, ep)", "ep"),
    "own axis": split("dp=2, ep=2", "dp", "ep"),
    "two axes": split("dp=2, ep=2", "(dp, ep)", "(dp, ep)"),
}


def some(plans: dict[str, str], fast: tuple[str, ...]) -> list[object]:
    """The plans, of which all but the `fast` ones are slow."""
    marks = {name: () if name in fast else (pytest.mark.slow,) for name in plans}
    return [pytest.param(plan, id=name, marks=marks[name]) for name, plan in plans.items()]


@pytest.mark.parametrize("plan", some(PLANS, ("2 ranks", "own axis")))
def test_routing_to_the_two_best_experts_is_a_masked_sum_on_any_mesh(plan: str) -> None:
    check_dense(plan)


MIXED = "\nexperts blocks.*.mlp over ep count=4 weight=0.1 capacity=1\n"
PARTS = "mesh dp=2, ep=2\ndata x, labels over (dp, ep)" + MIXED
ALONE = "mesh ep=2\ndata x, labels over ep" + MIXED
INNER = "columns blocks.*.mlp.experts.up over tp\nrows blocks.*.mlp.experts.down over tp"
TOGETHER = {
    "columns and rows": ALONE.replace("ep=2", "ep=2, tp=2") + INNER,
    "zero 1": PARTS + "zero 1 over (dp, ep)",
    "zero 3": PARTS + "zero 3 over dp",
    "checkpoint": ALONE + "checkpoint blocks.*",
    "accumulate": ALONE + "accumulate 2",
    "stages": ALONE.replace("ep=2", "pp=2, ep=2", 1) + "stages at blocks.1 over pp microbatches=2",
}


@pytest.mark.parametrize("plan", some(TOGETHER, ("columns and rows", "stages")))
def test_experts_go_with_other_statements(plan: str) -> None:
    check_dense(plan, model=Model(2 if "stages" in plan else 1))


ROUTES = {
    "switch": "route=switch",
    "three choices": "top=3 capacity=0.7",
    "prototypes": "route=prototype top=2 capacity=1",
    "expert choice": "route=expert_choice capacity=1.3",
    "groups": "groups=4",
    "no loss": "balance=none",
    "all dropped but one": "capacity=0.01",
}


@pytest.mark.parametrize("route", some(ROUTES, ("prototypes", "expert choice")))
def test_every_route_is_a_masked_sum(route: str) -> None:
    check_dense(f"mesh dp=2\ndata x, labels over dp\nexperts blocks.*.mlp over dp count=4 {route}")


DROPLESS = {
    "top 2": "",
    "three choices": "top=3",
    "switch": "route=switch",
    "prototypes": "route=prototype top=2 groups=4",
}


@pytest.mark.parametrize("route", some(DROPLESS, ("three choices", "prototypes")))
def test_routes_that_drop_nothing_are_masked_sums(route: str) -> None:
    mixed = f"experts blocks.*.mlp over ep count=4 dropless=true weight=0.1 {route}"
    check_dense(f"mesh dp=2, ep=1\ndata x, labels over dp\n{mixed}")


@pytest.mark.parametrize("room", ["dropless=true", "capacity=4"])
def test_ties_send_all_tokens_to_the_first_experts_and_leave_others_empty(room: str) -> None:
    mixed = f"experts blocks.*.mlp over ep count=4 weight=0.1 {room}"
    plan = meshwright.Plan.parse(f"mesh dp=2, ep=1\ndata x, labels over dp\n{mixed}")
    torch.manual_seed(0)
    sample = batch(4, 6)
    program = meshwright.compile(Model(1).double(), plan, example=sample)
    router = program.model.get_submodule("blocks.0.mlp.router")
    router.weight.data.zero_()
    check_trained(program, dense(program.model), [sample], compare=Comparison(1e-10))
    run = program.launch()
    run.step(*sample)
    assert run.metrics()["blocks.0.mlp"]["load"].tolist() == [0.5, 0.5, 0, 0]


ALL = "\nexperts blocks.*.mlp over ep count=4 weight=0.1 dropless=true\n"
DROPLESS_TOGETHER = {
    "zero 3": "mesh dp=2, ep=1\ndata x, labels over dp" + ALL + "zero 3 over dp",
    "checkpoint": "mesh dp=2, ep=1\ndata x, labels over dp" + ALL + "checkpoint blocks.*",
    "accumulate": "mesh dp=2, ep=1\ndata x, labels over dp" + ALL + "accumulate 2",
    "columns and rows": "mesh ep=1, tp=2\n" + ALL + INNER,
    "stages": "mesh pp=2, ep=1\ndata x, labels over ep"
    + ALL
    + "stages at blocks.1 over pp microbatches=2",
}


APART = {
    "data": "mesh ep=2\ndata x, labels over ep",
    "part of data": "mesh dp=2, ep=2\ndata x, labels over (dp, ep)",
    "own axis": "mesh dp=2, ep=2\ndata x, labels over dp",
    "4 ranks": "mesh ep=4\ndata x, labels over ep\naccumulate 2",
}


@pytest.mark.parametrize("plan", some(APART, ("part of data",)))
def test_rows_go_to_experts_on_other_ranks(plan: str) -> None:
    program = check_dense(plan + ALL)
    exchanges = program.comm().counts().get("exchange_rows[ep]", 0)
    assert exchanges == (0 if "over dp\n" in f"{plan}\n" else 10 if "accumulate" in plan else 5)


@pytest.mark.parametrize("plan", some(DROPLESS_TOGETHER, ("columns and rows",)))
def test_experts_without_a_capacity_go_with_other_statements(plan: str) -> None:
    program = check_dense(plan, model=Model(2 if "stages" in plan else 1))
    if "columns" in plan:
        assert str(program.parameters["blocks.0.mlp.experts.up.bias"].layout) == "[4, 16@tp]"


BALANCED = "\nexperts blocks.*.mlp over ep count=4 balance=bias rate=0.05 "
BIASED = {
    "dropless": "mesh dp=2, ep=2\ndata x, labels over (dp, ep)" + BALANCED + "dropless=true top=3",
    "prototypes": "mesh ep=2\ndata x, labels over ep" + BALANCED + "route=prototype",
    "switch": "mesh ep=2\ndata x, labels over ep" + BALANCED + "route=switch",
    "accumulate": "mesh ep=2\ndata x, labels over ep\naccumulate 2" + BALANCED,
    "checkpoint": "mesh ep=2\ndata x, labels over ep\ncheckpoint blocks.*" + BALANCED,
    "zero": "mesh dp=2, ep=1\ndata x, labels over dp\nzero 3 over dp" + BALANCED,
    "stages": "mesh pp=2, ep=2\ndata x, labels over ep" + BALANCED
    + "\nstages at blocks.1 over pp microbatches=2",
}  # fmt: skip


@pytest.mark.parametrize("plan", some(BIASED, ("accumulate", "checkpoint")))
def test_a_bias_follows_the_loads_of_the_whole_batch_once_a_step(plan: str) -> None:
    check_dense(plan, model=Model(2 if "stages" in plan else 1), steps=3)


def test_an_evaluation_leaves_the_bias_and_a_mixture_that_is_called_twice_moves_it_once() -> None:
    class Twice(Model):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return super().forward(self.blocks[0](x), labels)

    torch.manual_seed(0)
    plan = meshwright.Plan.parse("mesh ep=2\ndata x, labels over ep" + BALANCED)
    sample = batch(4, 6)
    run = meshwright.compile(Twice(1).double(), plan, example=sample).launch()
    name = "blocks.0.mlp.router.bias"
    run.evaluate(*sample)
    assert not run.state_dict()[name].any()
    run.step(*sample)
    loads = sum(each["load"] for each in run.metrics().values()) / 2
    expected = 0.05 * (0.25 - loads).sign().float()
    assert len(run.metrics()) == 2
    assert expected.any()
    torch.testing.assert_close(run.state_dict()[name], expected)
    assert run.state_dict()[name].dtype == torch.float32


ROOM = "mesh dp=2, ep=2\ndata x, labels over (dp, ep)\naccumulate 2" + ALL.rstrip()


def test_a_maximum_limits_what_ranks_take_and_an_error_says_which_would_do(
    golden: Callable[[str, str], None],
) -> None:
    torch.manual_seed(0)
    model, plan = Model(1).double(), meshwright.Plan.parse(f"{ROOM} maximum=1.75 top=1")
    sample = batch(8, 6)
    program = meshwright.compile(model, plan, example=sample)
    router = program.model.get_submodule("blocks.0.mlp.router")
    router.weight.data.zero_()  # ties, which the first expert wins
    with program.launch() as run:
        before = run.state_dict()
        with pytest.raises(OverfullError) as caught:
            run.step(*sample)
        assert all(value.equal(before[name]) for name, value in run.state_dict().items())
    golden("dropless-overfull", str(caught.value))


@pytest.mark.slow
def test_what_a_maximum_has_room_for_is_what_there_is_without_it() -> None:
    narrow = check_dense(f"{ROOM} maximum=1.9")
    wide = meshwright.compile(Model(1).double(), meshwright.Plan.parse(ROOM), example=batch(8, 6))
    assert narrow.memory().peak < wide.memory().peak
