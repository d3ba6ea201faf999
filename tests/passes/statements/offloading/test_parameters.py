"""`offload parameters` and `offload optimizer`: what is trained is elsewhere, and every bit of the
training is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.graph.ir import TO_DEVICE, WAIT, Phase
from meshwright.dsl.errors import PlanError
from meshwright.passes.statements.offloading import amount, parameters
from tests.alone import measured
from tests.models import Gpt, tokens
from tests.passes.examples import Mlp, rows
from tests.passes.stages import check_documented, shown
from tests.passes.statements.offloading import trainings
from tests.passes.statements.offloading.trainings import DATA, check_same, compiled
from tests.runtime.pipelines import SCHEDULES, Tied, plan_of

Golden = Callable[[str, str], None]
PLANS = {
    **trainings.PLANS,
    "zero 3 in bfloat16": DATA + "zero 3 over dp\nprecision bf16 master=bf16\naccumulate 2\n",
    "zero 1": DATA + "zero 1 over dp\nprecision bf16\ncheckpoint blocks.*\noffload activations\n",
}
LINES = {
    "parameters": "offload parameters\n",
    "optimizer": "offload optimizer\n",
    "some": "offload parameters blocks.* fraction=0.4 prefetch=3\noffload optimizer blocks.*\n",
    "disk": 'offload parameters to=disk path="{0}"\n',
    "both": 'offload parameters blocks.*\noffload optimizer to=disk path="{0}"\n',
}


def trained(model: nn.Module, plan: str, example: Any) -> dict[str, Tensor]:
    """Three updates, of which the second accumulates on the first's gradients: losses, gradients,
    norms, an evaluation, and the weights after them."""
    program = compiled(model, plan, example)
    found: dict[str, Tensor] = {}
    with program.launch(seed=3) as run:
        no_decay = {"params": ["**.bias"], "weight_decay": 0.0}
        optimizer = run.optimizer(torch.optim.AdamW, groups=[no_decay], lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            found[f"loss {step}"] = run.step(*example).clone()
            found |= {f"{n} {step}": g.clone() for n, g in run.gradients().items()}
            found[f"norm {step}"] = run.clip_grad_norm_(0.5).clone()
            optimizer.step()
            schedule.step()
            if step:
                optimizer.zero_grad()
        found["evaluated"] = run.evaluate(*example).clone()
        run.check(optimizer)
        found |= run.state_dict()
    return found


@cache
def without(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return trained(Gpt(p=0.1), PLANS[name], tokens())


def test_the_docstring_shows_a_parameter_and_its_gradient_before_and_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(amount, "SMALL_BYTES", 1024)
    plan = "mesh dp=1\ndata x over dp\n"
    before, after = (
        compiled(Mlp(), plan + each, rows()).graphs() for each in ("", "offload parameters up\n")
    )
    names = {"linear", "bucket", "bucket_to_host", "bucket_on_host", "up_weight_grad"}
    names |= {"up_weight_to_device", "up_weight_on_device"}

    def lines(graphs: dict[str, Any]) -> list[str]:
        return [
            line
            for graph in (graphs["stage0.forward"], graphs["stage0.backward"])
            for line in shown(
                graph,
                *(
                    n.name
                    for n in graph.nodes
                    if n.name in names and (n.op != TO_DEVICE or "forward" in graph.name)
                ),
            )
        ]

    check_documented(parameters, lines(before), lines(after))


PAIRS = [
    *(("data", "parameters"), ("data", "disk"), ("data", "both")),
    *(("zero 3 in bfloat16", "some"), ("zero 3 in bfloat16", "disk")),
    *(("all", "parameters"), ("all", "optimizer"), ("half", "some"), ("half", "both")),
    *(("zero 1", "parameters"), ("zero 1", "optimizer")),
]


@pytest.mark.parametrize(("name", "where"), PAIRS)
def test_every_bit_of_a_training_is_the_one_without(name: str, where: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan = PLANS[name] + LINES[where].format(tmp_path)
    check_same(trained(Gpt(p=0.1), plan, tokens()), without(name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: f"{each[0]}-{each[1]}")
def test_every_schedule_trains_with_the_bits_that_it_has_without(
    schedule: tuple[str, int],
) -> None:
    torch.manual_seed(0)
    model, example = Tied(4), tokens(12, 16, 4)
    plan = plan_of(*schedule, 4, 8, "zero 2" if schedule[1] == 1 else "tensor")
    wanted = trained(model, plan, example)
    lines = "offload parameters fraction=0.7\noffload optimizer\n"
    check_same(trained(model, plan + lines, example), wanted)


def test_a_parameter_is_on_the_device_around_its_uses_and_not_between() -> None:
    program = compiled(Gpt(layers=6), DATA + "offload parameters prefetch=5\n", tokens())
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        graph = program.stages[0].graphs[phase]
        comes = [node.args[0].args[1] for node in graph.nodes if node.op == TO_DEVICE]
        assert comes.count("blocks.3.up.weight") == 1
        # The head is tied to the embedding, which only the forward takes.
        assert comes.count("wte.weight") == (2 if phase is Phase.FORWARD else 1)
        begun = {node: place for place, node in enumerate(graph.nodes) if node.op == TO_DEVICE}
        for place, node in enumerate(graph.nodes):
            if node.op == WAIT and node.args[0] in begun:
                assert place - begun[node.args[0]] < 40
                assert any(node in each.operands() for each in graph.nodes[place : place + 12])


class Twice(nn.Module):
    """A weight that two layers in a row have, and that leaves the model as well."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.again, self.down = (nn.Linear(16, 16) for _ in range(3))
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(self.again(self.up(x)).tanh())
        return {"loss": y.square().mean(), "weight": self.up.weight.t(), "bias": self.down.bias}


def test_a_parameter_comes_once_for_uses_in_a_row_and_once_more_to_be_a_result() -> None:
    example, results = (torch.randn(8, 16),), list[list[Tensor]]()
    model = Twice()
    for line in ("", "offload parameters\n"):
        plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp\n" + line)
        program = meshwright.compile(model, plan, example, outputs=["weight", "bias"])
        with program.launch(seed=0) as run:
            results.append([*run.step(*example), *run.gradients().values()])
    assert all(map(torch.equal, *results))
    forward = program.stages[0].forward
    comes = Counter(node.args[0].args[1] for node in forward.nodes if node.op == TO_DEVICE)
    assert comes["up.weight"] == comes["down.bias"] == 2
    assert comes["down.weight"] == comes["up.bias"] == 1


def test_a_part_that_is_gathered_has_come_a_layer_ahead_of_the_gather() -> None:
    plan = DATA + "zero 3 over dp\noffload parameters blocks.* prefetch=0\n"
    forward = compiled(Gpt(layers=4), plan, tokens()).stages[0].forward
    users, places = forward.users(), {node: place for place, node in enumerate(forward.nodes)}
    ahead = [
        places[gather] - places[node]
        for node in forward.nodes
        if node.op == WAIT and node.name.startswith("blocks_3")
        for gather in users[node]
    ]
    layer = sum(any(path == "blocks.2" for path, _ in node.origin.modules) for node in places)
    assert ahead and min(ahead) > layer // 2


@pytest.mark.parametrize("what", ["parameters", "optimizer"])
def test_what_the_device_holds_is_affine_in_the_number_of_layers(what: str) -> None:
    found = []
    for count in range(1, 5):
        line = f"offload {what} blocks.[0:5] fraction={count}/5\n"
        memory = compiled(Gpt(layers=6), DATA + line, tokens()).memory()
        held = memory.parameters + memory.gradients + memory.optimizer
        found.append((held, memory.host))
    steps = [(a - c, d - b) for (a, b), (c, d) in pairwise(found)]
    assert len(set(steps)) == 1 and steps[0][0] > 0
    weights = sum(p.nbytes for p in Gpt().blocks[0].parameters())
    state = 3 * weights + 4 * len(list(Gpt().blocks[0].parameters()))
    copies = {"parameters": (weights + state,) * 2, "optimizer": (state, weights + state)}
    assert steps[0] == copies[what]


def test_parameters_are_spread_and_an_optimizers_layers_are_the_last() -> None:
    lines = "offload parameters blocks.* fraction=0.45\noffload optimizer blocks.* fraction=0.2\n"
    kept = compiled(Gpt(layers=8), DATA + lines, tokens()).parameters
    values = [kept[f"blocks.{i}.up.weight"].kept.value.away for i in range(8)]
    assert values == [False, True] * 4
    updates = [kept[f"blocks.{i}.up.weight"].kept.update.away for i in range(8)]
    assert updates == [False, True, False, True, False, True, True, True]


@pytest.mark.parametrize("what", ["parameters", "optimizer"])
def test_a_budget_takes_the_fewest_layers_with_which_it_is_kept(what: str) -> None:
    whole, all_of_them = (
        compiled(Gpt(layers=4), DATA + line, tokens()).memory().peak
        for line in ("", f"offload {what} blocks.*\n")
    )
    budget = (whole + all_of_them) // 2
    line = f"offload {what} blocks.* budget={budget}B\n"
    program = compiled(Gpt(layers=4), DATA + line, tokens())
    assert program.memory().peak <= budget
    kept = [s.kept for name, s in program.parameters.items() if name.endswith("qkv.weight")]
    count = sum(each.update.away for each in kept)
    assert 0 < count < 4
    fewer = f"offload {what} blocks.* fraction={count - 1}/4\n" if count > 1 else ""
    assert compiled(Gpt(layers=4), DATA + fewer, tokens()).memory().peak > budget


class Deep(nn.Module):
    """Layers whose weights need more than what they compute."""

    def __init__(self, layers: int = 40, d: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", ' to=disk path="{}"'])
@pytest.mark.parametrize("base", ["data x over dp\n", "data x over dp\nzero 3 over dp\n"])
def test_a_model_four_times_as_large_as_the_device_trains(
    options: str, base: str, tmp_path: Path
) -> None:
    example = (torch.randn(4, 64),)
    plan = "mesh dp=2\n" + base
    whole = compiled(Deep(), plan, example).memory()
    states = whole.parameters + whole.gradients + whole.optimizer
    program = compiled(Deep(), f"{plan}offload parameters{options.format(tmp_path)}\n", example)
    assert 4 * measured(program, example, 0, _later) <= states
    assert 4 * program.memory().peak <= states


def _later(run: Any, step: Callable[[], Any]) -> None:
    """Train, and have what comes after the first update measured: in that one, torch makes what the
    optimizer keeps before it goes where it is kept."""
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    run.step(torch.randn(4, 64))
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        step()


def test_reports_know_whose_parameters_and_gradients_are_sent() -> None:
    plan = DATA + "zero 3 over dp\nprecision bf16\n"
    plain, program = (
        compiled(Gpt(), plan + line, tokens()) for line in ("", "offload parameters\n")
    )
    for module in ("blocks.0.up", "wte"):
        ours, theirs = (each.explain(module) for each in (program, plain))
        assert len(ours.collectives) == len(theirs.collectives) > 0


ERRORS = {
    "offload-parameters-of-none": "offload parameters drop\n",
    "offload-parameters-too-small-a-budget": "offload parameters up budget=1B\n",
    "offload-tied-differently": "offload optimizer up\noffload optimizer again to=disk path='x'\n",
}


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.again, self.drop = nn.Linear(16, 16), nn.Linear(16, 16), nn.Dropout(0.1)
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.again(self.up(x))).square().mean()


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_has_its_golden_text(name: str, golden: Golden) -> None:
    plan = "mesh dp=2\ndata x over dp\n" + ERRORS[name].replace("'", '"')
    with pytest.raises(PlanError) as caught:
        compiled(Odd(), plan, (torch.randn(8, 16),))
    golden(name, str(caught.value))


def test_small_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amount, "SMALL_BYTES", 4096)
    kept = compiled(Gpt(), DATA + "offload parameters\n", tokens()).parameters
    assert {s.kept.value.away for name, s in kept.items() if "ln" in name} == {False}
    assert kept["blocks.0.up.weight"].kept.value.away
