"""The pass `share`: layers use the parameters of one of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright import PlanError
from meshwright.compiler.report.show import show_text
from meshwright.passes.statements import share
from tests.equivalence import Comparison, check_trained
from tests.layers import SHARING, Deep, Layer, batch, tied
from tests.passes.stages import check_documented, shown, stages


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x)).sum()


def shared(plan: str, model: nn.Module | None = None) -> dict[str, str]:
    """The parameters that are one with another under a plan on one rank, each with that."""
    program = mw.compile(model or Deep(), mw.Plan.parse(f"mesh one=1\n{plan}"), batch())
    return {alias: own for alias, own in program.captured.aliases.items() if alias != own}


def test_the_docstring_shows_layers_before_and_after() -> None:
    found = stages(Two(), (torch.randn(8, 16),), "mesh one=1\nshare blocks.*\n")
    names = "blocks_0_weight", "blocks_1_weight", "linear", "linear_1"
    before = shown(found["route"], *names)
    after = shown(found["share"], "blocks_0_weight", "linear", "linear_1")
    check_documented(share, before, after)


@pytest.mark.parametrize("name", [*list(SHARING)[:1], *(
    pytest.param(name, marks=pytest.mark.slow) for name in list(SHARING)[1:]
)])  # fmt: skip
def test_a_model_trains_as_one_whose_layers_are_tied(name: str) -> None:
    program = mw.compile(Deep(), mw.Plan.parse(SHARING[name]), batch())
    reference = tied(Deep(), program.captured.aliases)
    check_trained(program, reference, [batch(seed) for seed in range(4)], compare=Comparison(1e-10))


def test_the_gradient_of_what_is_shared_is_the_sum_of_those_of_its_uses() -> None:
    program = mw.compile(Deep(), mw.Plan.parse("mesh one=1\nshare blocks.*"), batch())
    apart = Deep()
    apart.load_state_dict(program.launch().state_dict())
    apart(*batch()).backward()
    with program.launch() as run:
        run.step(*batch())
        found = run.gradients()
    for name, _ in apart.blocks[0].named_parameters():
        each = [block.get_parameter(name).grad for block in apart.blocks]
        torch.testing.assert_close(found[f"blocks.3.{name}"], sum(each), rtol=0, atol=1e-12)


def test_a_run_starts_from_the_first_layers_values_and_has_them_under_every_name() -> None:
    model, other = Deep(), Deep()
    program = mw.compile(model, mw.Plan.parse("mesh one=1\nshare blocks.* every=2"), batch())
    with program.launch() as run:
        found = run.state_dict()
        run.copy_to(other)
        run.load_state_dict(found)
    first = model.blocks[1].up.weight
    assert found.keys() == model.state_dict().keys()
    assert torch.equal(found["blocks.3.up.weight"], first)
    assert torch.equal(other.blocks[3].up.weight, first)
    assert not torch.equal(model.blocks[3].up.weight, first)


def test_group_every_and_except_say_who_shares_what() -> None:
    up = "blocks.*.up"
    weights = "blocks.1.up.weight", "blocks.2.up.weight", "blocks.3.up.weight"

    def who(plan: str) -> list[str]:
        found = shared(plan)
        return [found.get(name, name).split(".")[1] for name in weights]

    assert who(f"share {up}") == ["0", "0", "0"]
    assert who(f"share {up} group=2") == ["0", "2", "2"]
    assert who(f"share {up} group=3") == ["0", "0", "3"]
    assert who(f"share {up} every=2") == ["1", "0", "1"]
    assert who("share blocks.0, blocks.3") == ["1", "2", "0"]
    assert who("share blocks.[0:2]\nshare blocks.[2:]") == ["0", "2", "2"]
    kept = {name.partition(".up.")[2] for name in shared('share blocks.* except=[ln, "*.bias"]')}
    assert kept == {"", "weight"}
    assert not any(".ln." in name for name in shared("share blocks.* except=[ln]"))


def test_of_two_statements_the_one_for_the_inner_layer_holds() -> None:
    found = shared("share blocks.* group=2\nshare blocks.*.up every=2")
    assert found["blocks.3.down.weight"] == "blocks.2.down.weight"
    assert found["blocks.3.up.weight"] == "blocks.1.up.weight"
    assert "blocks.2.down.weight" not in found
    assert found["blocks.2.up.weight"] == "blocks.0.up.weight"


class Odd(nn.Module):
    """Layers that differ in one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.frozen, self.wide, self.tied = (Layer().double() for _ in range(4))
        self.frozen.up.bias.requires_grad_(False)
        self.wide.up, self.wide.down = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        self.tied.ln.bias = self.tied.down.bias
        self.bare = nn.Linear(8, 8, bias=False).double()
        self.act, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x.sum()


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("other-shape", "share plain, wide"),
        ("frozen", "share plain, frozen"),
        ("tied", "share plain, tied"),
        ("missing", "share plain.up, bare except=[weight]"),
        ("more-excepted", "share plain, wide except=[ln, up.weight]"),
        ("nested", "share plain, wide, plain.*"),
        ("one-layer", "share plain"),
        ("no-parameters", "share act, act2"),
        ("alone", "share plain, frozen every=2"),
        ("all-excepted", 'share plain, wide except=["**"]'),
        ("no-such-name", "share plain, wide except=[lm]"),
        ("no-selector", 'share plain, wide except=["a b"]'),
        ("both", "share plain, wide group=2 every=2"),
    ],
)
def test_what_cannot_be_shared_is_said(
    name: str, plan: str, golden: Callable[[str, str], None]
) -> None:
    plan = plan.replace("up.weight]", '"up.weight"]')
    with pytest.raises(PlanError) as caught:
        shared(plan, Odd())
    golden(f"share-{name}", str(caught.value))


def test_a_class_does_not_say_which_layers_share() -> None:
    class Stack(Deep):
        __plan__ = "share blocks.*"

    with pytest.raises(PlanError, match="P114"):
        shared("", Stack())


def test_show_says_which_parameters_are_one(golden: Callable[[str, str], None]) -> None:
    plan = mw.Plan.parse("mesh one=1\nshare blocks.* group=2 except=[ln]", "deep.plan")
    golden("share-show", show_text(mw.compile(Deep(6), plan, batch())))


def test_memory_has_what_is_shared_once() -> None:
    def figures(text: str) -> dict[str, object]:
        plan = mw.Plan.parse(f"mesh one=1\n{text}")
        return mw.compile(Deep(), plan, batch()).memory().figures()

    layer = sum(p.nbytes for p in Layer().double().parameters())
    one, every = figures("share blocks.*"), figures("")
    assert every["parameters"] - one["parameters"] == 3 * layer
    assert every["gradients"] - one["gradients"] == 3 * layer
    assert every["optimizer"] - one["optimizer"] >= 6 * layer


def test_no_more_than_one_layers_gradients_wait_to_be_added_up() -> None:
    class Wide(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x).relu()
            return x.sum()

    plan = mw.Plan.parse("mesh one=1\nshare blocks.*")
    few, many = (mw.compile(Wide(n), plan, (torch.randn(4, 256),)).memory() for n in (3, 9))
    assert many.peak - few.peak < 256 * 256 * 4 / 2


def test_buffers_stay_the_layers_own() -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(8) for _ in range(2))).double()
    plan = mw.Plan.parse('mesh one=1\nshare "0", "1"')
    with mw.compile(model, plan, batch(), loss=torch.sum).launch() as run:
        run.step(*batch())
        found = run.state_dict()
    assert torch.equal(found["0.weight"], found["1.weight"])
    assert not torch.equal(found["0.running_mean"], found["1.running_mean"])
