"""Modules become mixtures of experts: what they hold, send and report, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.public import Program
from meshwright.dsl.errors import MeshwrightError
from meshwright.passes.experts.mixture import Mixture, Settings
from meshwright.passes.experts.routes import Routing
from tests.passes.experts.dense import Experts, Model, batch

DATA = "mesh dp=2\ndata x, labels over dp\n"
MIXED = DATA + "experts blocks.*.mlp over dp count=4 "


def compiled(plan: str = MIXED, model: nn.Module | None = None) -> tuple[Program, nn.Module]:
    torch.manual_seed(0)
    model = (model or Model(1)).double()
    return meshwright.compile(model, meshwright.Plan.parse(plan), example=batch(8, 6)), model


def test_tokens_go_to_experts_and_back_by_two_exchanges_in_each_direction() -> None:
    program, _ = compiled()
    counts = program.comm().counts()
    assert counts["all_to_all[dp]"] == 4
    assert "all_gather[dp]" not in counts
    weight = program.parameters["blocks.0.mlp.experts.up.weight"]
    assert str(weight.layout) == "[4@dp, 16, 8]"
    # Both exchanges are there for the line about experts, and so are their adjoints.
    lines = {(each.kind, each.plan_line) for each in program.comm()}
    assert {line for kind, line in lines if kind == "all_to_all"} == {"<plan>:3"}
    assert {line for kind, line in lines if kind == "all_reduce"} == {"<plan>:2"}
    # Nothing of an expert is reduced: tokens of all ranks have come to it.
    reduced = next(g for g in program.graphs().values() if "backward" in g.name)
    kinds = {str(node.op) for node in reduced.nodes if "experts" in node.origin.module}
    assert "mesh::all_reduce" not in kinds


@pytest.mark.parametrize("route", ["", "dropless=true", "route=prototype"])
def test_routers_compute_in_float32_where_others_do_not(route: str) -> None:
    plan = meshwright.Plan.parse(f"{MIXED}{route}\nprecision bf16")
    x, labels = batch(8, 6)
    program = meshwright.compile(Model(1), plan, example=(x.float(), labels))
    found = {
        node.origin.module: node.tensor.dtype
        for node in program.stages[0].forward.nodes
        if node.op == torch.ops.aten.linear.default
    }
    assert found["blocks.0.mlp.router"] == torch.float32
    assert found["head"] == torch.bfloat16


def test_the_model_stays_as_it_was_and_shares_all_else() -> None:
    program, model = compiled()
    assert isinstance(model.blocks[0].mlp, Experts)
    assert program.model.first.weight is model.first.weight
    assert model.blocks[0].mlp.up.weight.shape == (16, 8)


def test_experts_begin_as_noisy_copies_of_a_module_or_anew() -> None:
    copied, model = compiled()
    own = model.blocks[0].mlp.up.weight
    stacked = copied.model.blocks[0].mlp.experts.up.weight
    away = (stacked - own).std((1, 2)) / own.std()
    assert ((away > 0.005) & (away < 0.02)).all()
    assert not torch.equal(stacked[0], stacked[1])
    again, _ = compiled(MIXED + "seed=0")
    other, _ = compiled(MIXED + "seed=1")
    fresh, _ = compiled(MIXED + "init=fresh")
    weights = [each.model.blocks[0].mlp.experts.up.weight for each in (again, other, fresh)]
    assert torch.equal(weights[0], stacked)
    assert not torch.equal(weights[1], stacked)
    assert ((weights[2] - own).std((1, 2)) > own.std()).all()
    assert (weights[2].abs().amax((1, 2)) <= 8**-0.5).all()


def test_single_numbers_are_copied_as_they_are_and_what_is_frozen_stays_so() -> None:
    region = Experts(8)
    region.up.requires_grad_(False)
    region.scale = nn.Parameter(torch.tensor(2.0))
    experts = Mixture("mlp", region, 8, Settings(Routing("topk", 4, 2, 1.0))).experts
    assert experts.scale.tolist() == [2.0] * 4
    assert not experts.up.weight.requires_grad
    assert experts.down.weight.requires_grad


def test_a_model_without_values_begins_anew() -> None:
    with torch.device("meta"):
        model = Model(1)
    program, _ = compiled(model=model)
    weights = program.launch().state_dict()
    up = weights["blocks.0.mlp.experts.up.weight"]
    assert (up.std((1, 2)) > 0.1).all()
    assert up.abs().max() <= 8**-0.5
    assert not torch.equal(up[0], up[1])


class Dropped(Experts):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y = nn.functional.dropout(y, 0.2, self.training)
        return y + 0.1 * torch.rand_like(y) if self.training else y


@pytest.mark.parametrize("more", ["second=random noise=0.05"])
def test_random_routes_are_the_same_under_every_plan(more: str) -> None:
    found, sample = [], batch(8, 6)
    model = Model(1, make=Dropped).double()
    for plan in (MIXED.replace("dp=2", "dp=1"), MIXED, MIXED + more + "\naccumulate 2"):
        text = plan if more in plan else plan + more
        program = meshwright.compile(model, meshwright.Plan.parse(text), example=sample)
        run = program.launch(seed=3)
        found.append([run.step(*sample), run.gradients()["blocks.0.mlp.router.weight"].sum()])
        found[-1].append(run.evaluate(*sample))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])


def routed_by(weight: Tensor, plan: str, sample: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The metrics of a step in which the router has this weight."""
    program, _ = compiled(plan)
    run = program.launch(
        state_dict={**program.model.state_dict(), "blocks.0.mlp.router.weight": weight}
    )
    assert run.step(*sample).isfinite()
    assert all(grad.isfinite().all() for grad in run.gradients().values())
    return run.metrics()["blocks.0.mlp"]


def test_equal_logits_are_ties_that_the_first_experts_win() -> None:
    found = routed_by(torch.zeros(4, 8).double(), MIXED + "capacity=1", batch(8, 6))
    torch.testing.assert_close(found["load"], torch.tensor([0.5, 0.5, 0, 0]).double())
    torch.testing.assert_close(found["dropped"], torch.tensor(0.5).double())
    torch.testing.assert_close(found["entropy"], torch.tensor(4.0).double().log())


def test_all_tokens_to_one_expert_are_dropped_beyond_its_capacity() -> None:
    weight = torch.zeros(4, 8).double()
    found = routed_by(weight, MIXED + "route=switch capacity=4", batch(8, 6))
    assert found["load"].tolist() == [1, 0, 0, 0]
    assert found["dropped"] == 0
    found = routed_by(weight, MIXED + "route=switch capacity=2", batch(8, 6))
    torch.testing.assert_close(found["dropped"], torch.tensor(0.5).double())


def test_the_auxiliary_loss_is_added_in_training_alone() -> None:
    added, _ = compiled(MIXED + "weight=0.5 route=switch")
    sample, weight = batch(8, 6), torch.zeros(4, 8).double()
    state = {"blocks.0.mlp.router.weight": weight}
    # All tokens go to the first of four experts that are equally probable: 4 * 1 * 1/4.
    alone, _ = compiled(MIXED + "balance=none route=switch")
    runs = [each.launch(state_dict=each.model.state_dict() | state) for each in (added, alone)]
    more, own = (run.step(*sample) for run in runs)
    torch.testing.assert_close(more - own, torch.tensor(0.5).double())
    torch.testing.assert_close(*(run.evaluate(*sample) for run in runs))


def test_metrics_are_empty_without_mixtures() -> None:
    program, _ = compiled(DATA)
    run = program.launch()
    run.step(*batch(8, 6))
    assert run.metrics() == {}


class Mixing(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True))


class Tied(Experts):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.again = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.again.T @ self.again)


class Nested(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Sequential(nn.Linear(width, width), nn.ReLU()))


class Bare(nn.Module):
    """Parameters without a way to draw them again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Attending(Experts):
    """Attention that draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.1).squeeze(1)


class Looked(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x[..., 0].abs().long().clamp(max=8))


REFUSED: dict[str, tuple[str, type[nn.Module]]] = {
    "experts-tokens-are-mixed": (MIXED, Mixing),
    "experts-tied": (MIXED, Tied),
    "experts-no-parameters": (DATA + "experts blocks.*.mlp.act over dp count=4", Experts),
    "experts-no-tokens": (DATA + "experts blocks over dp count=4", Experts),
    "experts-misspelt": (DATA + "experts blocks.*.mpl over dp count=4", Experts),
    "experts-do-not-divide": (DATA + "experts blocks.*.mlp over dp count=3", Experts),
    "experts-groups-do-not-divide": (MIXED + "groups=5", Experts),
    "experts-attend": (MIXED, Attending),
    "experts-of-numbers": (DATA + "experts blocks.*.mlp.table over dp count=4", Looked),
    "experts-inside-of-experts": (MIXED + "\nexperts blocks.*.mlp.0 over dp count=2", Nested),
    "experts-not-anew": (MIXED + "init=fresh", Bare),
    "experts-without-a-count": (DATA + "experts blocks.*.mlp over dp", Experts),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_experts_is_explained(name: str, golden: Callable[[str, str], None]) -> None:
    plan, make = REFUSED[name]
    with pytest.raises(MeshwrightError) as caught:
        compiled(plan, Model(1, make=make))
    golden(name, str(caught.value))


def test_a_mixture_keeps_the_options_it_was_made_with(golden: Callable[[str, str], None]) -> None:
    model = compiled()[0].model
    again, _ = compiled(MIXED + "seed=3", model)
    assert again.parameters["blocks.0.mlp.router.weight"].type.shape == (4, 8)
    with pytest.raises(MeshwrightError) as caught:
        compiled(MIXED + "capacity=2", model)
    golden("experts-already", str(caught.value))


def test_rows_without_a_batch_need_groups(golden: Callable[[str, str], None]) -> None:
    model, plan = Model(1).double(), meshwright.Plan.parse(MIXED)
    with pytest.raises(MeshwrightError) as caught:
        meshwright.compile(model, plan, example=batch(8))
    golden("experts-without-groups", str(caught.value))
