"""`offload activations`: what is saved is elsewhere meanwhile, and no bit of a step is another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.graph.ir import INPUT, MOVES, SAVED, WAIT, Graph, Node, Phase
from meshwright.compiler.program import STAGING_BYTES
from meshwright.dsl.errors import PlanError
from meshwright.passes.statements.offloading import activations, amount
from tests.equivalence import check_equal
from tests.models import Gpt, tokens
from tests.passes.examples import Mlp, rows
from tests.passes.stages import check_documented, shown
from tests.passes.statements.offloading.trainings import DATA, PLANS, check_same, compiled
from tests.runtime.pipelines import SCHEDULES, Deep, Tied, plan_of

Golden = Callable[[str, str], None]
OPTIONS = [
    "blocks.*",
    "fraction=0.4 prefetch=0",
    "to=disk path={}",
    "\ncheckpoint blocks.* segments=2 keep=[sdpa]",
]


def trained(model: nn.Module, plan: str, example: Any) -> dict[str, Tensor]:
    """The losses and gradients of two steps, an evaluation, and the weights after them."""
    program = compiled(model, plan, example)
    found: dict[str, Tensor] = {}
    with program.launch(seed=3) as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
        for step in range(2):
            found[f"loss {step}"] = run.step(*example).clone()
            found |= {f"{n} {step}": g.clone() for n, g in run.gradients().items()}
            optimizer.step()
            optimizer.zero_grad()
        found["evaluated"] = run.evaluate(*example).clone()
        found |= run.state_dict()
        # Buffers in host memory through which values go to each folder of files.
        folders = {path for state in run.states for path in state.stores.by_path if path}
        held = Counter(host=STAGING_BYTES * len(folders))
        for path, store in (item for state in run.states for item in state.stores.by_path.items()):
            assert store.slabs.peak > 0
            held |= Counter({"host" if path is None else "disk": store.slabs.peak})
        for place in ("host", "disk"):
            memories = program.memories().values()
            assert held[place] == max(getattr(each, place) for each in memories)
    return found


@cache
def without(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return trained(Gpt(p=0.1, layers=3), PLANS[name], tokens())


def moves(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op in MOVES]


def test_the_docstring_shows_a_saved_value_before_and_after() -> None:
    plan = "mesh dp=1\ndata x over dp\n"
    before, after = (
        compiled(Mlp(), plan + each, rows()).graphs() for each in ("", "offload activations\n")
    )
    names = ["relu", "linear_1", "relu_to_host", "relu_on_host", "relu_to_device"]
    names.append("threshold_backward")

    def lines(graphs: dict[str, Graph]) -> list[str]:
        return [
            line
            for graph in graphs.values()
            for line in shown(graph, *(n.name for n in graph.nodes if n.name in names))
        ]

    check_documented(activations, lines(before), lines(after))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_bit_of_a_step_is_the_one_without(name: str, options: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    line = "offload activations " + options.format(f'"{tmp_path}"') + "\n"
    check_same(trained(Gpt(p=0.1, layers=3), PLANS[name] + line, tokens()), without(name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: f"{each[0]}-{each[1]}")
def test_every_schedule_computes_the_bits_that_it_does_without(schedule: tuple[str, int]) -> None:
    torch.manual_seed(0)
    model, example = Tied(4), tokens(12, 16, 4)
    plan = plan_of(*schedule, 4, 8, "zero 2" if schedule[1] == 1 else "tensor")
    wanted = trained(model, plan, example)
    lines = "offload activations\n" + ("checkpoint blocks.*\n" if schedule[1] == 2 else "")
    check_same(trained(model, plan + lines, example), wanted)


def test_what_enters_a_region_and_what_it_keeps_travel_and_nothing_else_does() -> None:
    for keep, kept in ("", set()), (" keep=[linear]", {"linear"}):
        lines = f"checkpoint blocks.*{keep}\noffload activations blocks.*\n"
        forward = compiled(Gpt(p=0.1, layers=5), DATA + lines, tokens()).stages[0].forward
        found = {node.args[0].name for node in forward.nodes if node.op in MOVES}
        assert {"add_2", "add_4", "add_6"} <= found
        assert {name.split("_")[0] for name in found} == {"add", *kept}


class Odd(nn.Module):
    """Parts of one value, a value of two users, a layer that is called twice, and truths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.first(x).chunk(3, -1)
        y = self.both(self.both(a * b).sin() * c.t().exp().t())
        y = torch.where(y > 0, y * y, y.tanh()) + F.dropout(y, 0.5)
        return (y.cumsum(1) * y[:, :1].expand_as(y)).square().mean()


@pytest.mark.parametrize("micro", ["", "accumulate 2\n"])
def test_views_of_one_value_travel_once_and_are_taken_again(micro: str) -> None:
    torch.manual_seed(0)
    model, plan = Odd().double(), "mesh dp=2\ndata x over dp\n" + micro
    example = (torch.randn(8, 16, dtype=torch.float64),)
    wanted = trained(model, plan, example)
    check_same(trained(model, plan + "offload activations prefetch=2\n", example), wanted)
    forward = compiled(model, plan + "offload activations\n", example).stages[0].forward
    found = [name for name in moves(forward) if name.startswith(("linear_to", "split", "getitem"))]
    assert found == ["linear_to_host"]


class Tuple(nn.Module):
    """Results whose names are numbers, as those of saved values are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = [x]
        for layer in self.layers:
            found.append(layer(found[-1]).relu())
        return found[-1].square().mean(), *found[2:], found[1]


def test_results_are_not_taken_for_saved_values_of_their_names() -> None:
    torch.manual_seed(0)
    plan = "mesh dp=2\ndata x over dp\noffload activations\n"
    outputs = tuple(map(str, range(1, 4)))
    check_equal(
        Tuple(), lambda: (torch.randn(8, 16, dtype=torch.float64),), plan, loss="0", outputs=outputs
    )


def test_a_model_with_values_elsewhere_trains_as_the_model_does() -> None:
    torch.manual_seed(0)
    check_equal(Gpt(layers=3), tokens, PLANS["all"] + "offload activations blocks.* prefetch=4\n")


def test_each_value_leaves_after_its_last_use_and_comes_back_so_many_nodes_ahead() -> None:
    line = "offload activations blocks.* prefetch=5\n"
    plain, program = (compiled(Gpt(layers=2), DATA + each, tokens()) for each in ("", line))
    forward, backward = (program.stages[0].graphs[each] for each in (Phase.FORWARD, Phase.BACKWARD))
    users, places = forward.users(), {node: place for place, node in enumerate(forward.nodes)}
    last = max(place for node, place in places.items() if node.op not in (*MOVES, WAIT))
    stays = Counter[int]()
    for node, place in places.items():
        if node.op in MOVES:
            assert not set(users[node.args[0]]) & set(forward.nodes[place + 1 :])
        elif node.op == WAIT and place < last:
            between = forward.nodes[places[node.args[0]] : place]
            stays[sum(each.op not in (*MOVES, WAIT) for each in between)] += 1
    ((layer, count),) = stays.items()
    own = [n for n in places if any(path == "blocks.0" for path, _ in n.origin.modules)]
    assert count > 8 and layer == sum(n.op not in (*MOVES, WAIT) for n in own)
    own = {
        n.name for n in plain.stages[0].graphs[Phase.BACKWARD].nodes if n.op not in (INPUT, SAVED)
    }
    before, begun, ahead = 0, dict[Node, int](), list[int]()
    for node in backward.nodes:
        before += node.name in own
        if node.op in MOVES:
            begun[node] = before
        elif node.op == WAIT:
            start = begun[node.args[0]]
            ahead += [before - start] if start else []
    assert set(ahead) == {5} and len(ahead) > 8


def test_the_last_layer_of_a_stage_stays_where_its_backward_follows_at_once() -> None:
    plan = "mesh pp=2\ndata tokens, targets\nstages at blocks.2 over pp microbatches=4\n"
    stages = compiled(Gpt(layers=4), plan + "offload activations blocks.*\n", tokens()).stages
    first, second = (
        {path for n in stage.forward.nodes if n.op in MOVES for path, _ in n.origin.modules}
        for stage in stages
    )
    assert {"blocks.0.up", "blocks.1.up"} <= first
    assert "blocks.2.up" in second and "blocks.3.up" not in second


def test_the_device_holds_less_by_as_much_for_each_layer() -> None:
    found = []
    for fraction in ("1/4", "0.26", "3/4"):  # any part of a layer is that layer
        line = f"offload activations blocks.[0:4] fraction={fraction}\n"
        memory = compiled(Gpt(layers=5), DATA + line, tokens()).memory()
        found.append((memory.activations, memory.host))
    steps = [(a - c, d - b) for (a, b), (c, d) in pairwise(found)]
    assert len(set(steps)) == 1 and steps[0][0] == steps[0][1] > 0


def test_a_budget_takes_the_fewest_layers_with_which_it_is_kept() -> None:
    def peak(line: str) -> tuple[int, int]:
        plan = f"mesh dp=2\ndata x over dp\noffload activations layers.* {line}\n"
        memory = compiled(Deep(), plan, (torch.randn(256, 16),)).memory()
        return memory.peak, memory.host

    shares = [peak(f"fraction={count}/8") for count in range(1, 9)]
    peaks = [size for size, _ in shares]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) > 3
    for budget in (peaks[2], min(peaks)):
        fewest = next(each for each in shares if each[0] <= budget)
        assert peak(f"budget={budget}B") == fewest
    with pytest.raises(PlanError) as caught:
        peak(f"budget={min(peaks) - 1}B")
    # The one that it names is enough.
    assert peak(re.findall(r"budget=\w+", str(caught.value))[-1]) in shares


ERRORS = {
    "offload-too-small-a-budget": (Gpt, DATA + "offload activations blocks.* budget=1KiB\n"),
    "offload-two-budgets": (
        Gpt,
        DATA + "offload activations blocks.0 budget=1MiB\noffload activations blocks.1 budget=2MiB",
    ),
    "offload-of-a-list": (Gpt, DATA + "offload activations blocks\n"),
    "offload-of-no-module": (Gpt, DATA + "offload activations blocks.*.mlp\n"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_has_its_golden_text(name: str, golden: Golden) -> None:
    make, plan = ERRORS[name]
    torch.manual_seed(0)
    with pytest.raises(PlanError) as caught:
        compiled(make(), plan, tokens())
    text = re.sub(r"write `budget=\d+KiB`", "write `budget=NKiB`", str(caught.value))
    golden(name, re.sub(r"[\d.]+ KiB with", "N KiB with", text))


def test_small_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amount, "SMALL_BYTES", 1 << 20)
    program = compiled(Gpt(layers=2), DATA + "offload activations\n", tokens())
    assert not moves(program.stages[0].forward)
    assert program.memory().host == 0


def test_a_timeline_has_a_bar_while_a_value_is_on_its_way() -> None:
    program = compiled(Gpt(layers=2), DATA + "offload activations blocks.*\n", tokens())
    found = program.timeline()
    assert re.search(r"┌\S* start \w+_to_host: to_host", found)
    assert re.search(r"└\S* wait \w+_to_device", found)


def test_a_failure_of_the_disk_ends_the_step_and_leaves_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    line = f'offload activations to=disk path="{tmp_path}"\n'
    program, example = compiled(Gpt(layers=2), DATA + line, tokens()), tokens()
    with program.launch(seed=1) as run, compiled(Gpt(layers=2), DATA, example).launch() as other:
        other.load_state_dict(run.state_dict())
        with monkeypatch.context() as patched:
            patched.setattr("os.posix_fallocate", no_room)
            with pytest.raises(meshwright.RunError, match="No space left"):
                run.step(*example)
        assert run.step(*example).equal(other.step(*example))


def no_room(*_: Any) -> None:
    raise OSError(28, "No space left on device")
