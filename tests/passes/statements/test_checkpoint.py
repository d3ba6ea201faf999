"""`checkpoint SEL`: the backward computes regions again, to the bit what the forward computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.graph.ir import Node, OutputKind, Phase
from meshwright.compiler.public import Program
from meshwright.passes.statements import checkpoint as passed
from tests.equivalence import check_equal
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, rows, tokens
from tests.passes.examples import Blocks, sequences
from tests.passes.stages import check_documented, shown

MODEL, BATCH, OTHER = Gpt(p=0.2, layers=4), tokens(), tokens(batch=4)
TENSOR = f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}vocab wte, head over tp\n"
SEQUENCE = TENSOR + "sequence blocks.* over tp\n"
STAGES = (
    "sequence blocks.* over tp\n"
    "stages at blocks.1, blocks.2, blocks.3 over pp virtual=2 schedule=zbv microbatches=4\n"
)
BASES = {
    "data": f"mesh dp=2\n{GPT_DATA}",
    "tensor": TENSOR,
    "sequence": f"{SEQUENCE}zero 1 over dp\n",
    "zero 3": f"mesh dp=2\n{GPT_DATA}zero 3 over dp\naccumulate 2\n",
    "bf16": f"mesh dp=2\n{GPT_DATA}zero 3 over dp\nprecision bf16\n",
    "fp16": f"mesh dp=2\n{GPT_DATA}zero 2 over dp\nprecision fp16 keep=[norm]\naccumulate 2\n",
    "zb": f"mesh dp=2, pp=2\n{GPT_DATA}stages at blocks.2 over pp schedule=zb microbatches=4\n",
    "zbv": f"mesh pp=2, tp=2\ndata tokens, targets\n{GPT_TENSOR}{STAGES}",
    "dualpipe": f"mesh pp=2\n{GPT_DATA.replace(' over dp', '')}"
    "stages at blocks.2 over pp schedule=dualpipe microbatches=4\n",
}
CHECKPOINTS = {
    "each": "checkpoint blocks.*\n",
    "segments": "checkpoint blocks.* segments=2\n",
    "kept": "checkpoint blocks.[1:4] segments=2 keep=[sdpa, up]\n".replace(", up", ", linear"),
    "nested": "checkpoint blocks.* segments=2\ncheckpoint blocks.*.{qkv,up,ln2} keep=[norm]\n",
    "everything": 'checkpoint ""\ncheckpoint blocks.*\ncheckpoint blocks.*.* keep=[gelu]\n',
}
QUICK = list(zip(BASES, [*CHECKPOINTS] * 2, strict=False))


def compiled(plan: str, model: nn.Module = MODEL, batch: tuple[Tensor, ...] = BATCH) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), batch)


def trained(program: Program) -> Iterator[Tensor]:
    """All that three steps give: losses, gradients, and what is trained."""
    run = program.launch(seed=3)
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        yield run.step(*BATCH).clone()
        yield from (gradient.clone() for gradient in run.gradients().values())
        optimizer.step()
        optimizer.zero_grad()
    yield from run.state_dict().values()


@pytest.mark.parametrize("name", BASES)
def test_all_bits_are_those_of_a_step_that_saves_everything(name: str) -> None:
    expected = list(trained(compiled(BASES[name])))
    for base, checkpoint in QUICK:
        if base == name:
            program = compiled(BASES[name] + CHECKPOINTS[checkpoint])
            assert again(program)
            assert all(map(torch.equal, trained(program), expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_all_bits_are_the_same_under_every_checkpoint(name: str) -> None:
    expected = list(trained(compiled(BASES[name])))
    for statements in CHECKPOINTS.values():
        assert all(map(torch.equal, trained(compiled(BASES[name] + statements)), expected))


def again(program: Program) -> list[Node]:
    """What the backward computes again."""
    graphs = program.graphs().values()
    return [node for graph in graphs for node in graph.nodes if node.origin.region]


def products(program: Program) -> Counter[str]:
    """How often each module's product is computed."""
    nodes = (node for graph in program.graphs().values() for node in graph.nodes)
    return Counter(n.origin.module for n in nodes if str(n.op) == "aten.linear.default")


def test_the_docstring_shows_what_is_computed_again() -> None:
    graphs = compiled("mesh tp=1\ncheckpoint block\n", Blocks(), sequences()).graphs()
    before = compiled("mesh tp=1\n", Blocks(), sequences()).graphs()
    names = "linear", "relu"
    (*forward,) = shown(graphs["stage0.forward"], *names)
    backward = shown(graphs["stage0.backward"], "linear_again", "relu_again", "threshold_backward")
    joint = shown(before["stage0.backward"], "threshold_backward")
    check_documented(passed, [*forward, *joint], [*forward, *backward])


def test_what_enters_and_leaves_a_region_is_saved_and_nothing_else() -> None:
    graphs = compiled(BASES["data"] + "checkpoint blocks.*\n").graphs()
    saved = graphs["stage0.forward"].outputs_of(OutputKind.SAVED)
    inside = [each.node for each in saved if each.node.origin.module.startswith("blocks.")]
    assert [node.name for node in inside] == ["add_2", "add_4", "add_6", "add_8"]
    # The last product of a block, and what is added to it, only lead out of it.
    assert products(compiled(BASES["data"] + "checkpoint blocks.*\n"))["blocks.1.down"] == 1


class Summed(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def test_a_norm_whose_result_leaves_is_not_repeated_for_its_statistics() -> None:
    model = Summed(nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8)), nn.Tanh(), nn.Linear(8, 1))
    plan = "mesh dp=1\ndata x over dp\ncheckpoint layers.0\n"
    program = compiled(plan, model, (torch.randn(8, 16),))
    assert [node.name for node in again(program)] == ["linear_again"]


def test_kept_operators_are_saved_and_what_leads_to_them_is_not_computed_again() -> None:
    found = products(compiled(BASES["data"] + "checkpoint blocks.* keep=linear\n"))
    assert set(found.values()) == {1}
    program = compiled(BASES["data"] + "checkpoint blocks.* keep=[sdpa]\n")
    assert not any(node.name.startswith("attention") for node in again(program))
    assert {*found} == {*products(program)}
    assert products(program)["blocks.0.up"] == 2


def test_of_nested_regions_the_innermost_says_what_is_kept() -> None:
    nested = "checkpoint blocks.* keep=[linear]\ncheckpoint blocks.*.{qkv,up}\n"
    found = products(compiled(BASES["data"] + nested))
    # A product that leaves its own region is saved, or computed again for the one around it.
    assert (found["blocks.0.proj"], found["blocks.0.up"]) == (1, 2)


def test_an_inner_region_is_computed_once_more_for_the_outer_one() -> None:
    outer = "checkpoint blocks.* segments=1\n"
    inner = outer.replace("blocks.*", "blocks.{0,1}") + "checkpoint blocks.0.{qkv,up}\n"
    alone, both = (products(compiled(BASES["data"] + each)) for each in (outer, inner))
    assert alone["blocks.0.qkv"] == both["blocks.0.qkv"] == 2
    wide = 'checkpoint ""\ncheckpoint blocks.*\n'
    found = products(compiled(BASES["data"] + wide))
    assert (found["blocks.0.up"], found["blocks.3.up"], found["blocks.3.down"]) == (3, 3, 2)


def mlp(d: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))


class Pair(nn.Module):
    """One module that is called twice, and what runs between the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = mlp(16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return (self.mlp(self.norm(torch.sin(self.mlp(x)))) + x.cos()).square().mean()


@pytest.mark.parametrize(("statement", "sines"), [("mlp", 1), ("mlp segments=1", 2)])
def test_each_call_is_a_region_and_a_segment_has_what_runs_between(
    statement: str, sines: int
) -> None:
    program = check_equal(Pair(), rows(), f"mesh dp=2\ndata x over dp\ncheckpoint {statement}\n")
    nodes = [node for graph in program.graphs().values() for node in graph.nodes]
    assert sum(node.name.startswith("sin") for node in nodes) == sines
    assert len({node.origin.region for node in again(program)}) == 1


@pytest.mark.parametrize("base", ["tensor", "sequence", "zero 3", "zbv"])
@pytest.mark.parametrize(
    "statements", ["checkpoint blocks.*\n", "checkpoint blocks.* segments=2\n"]
)
def test_no_collective_is_repeated(base: str, statements: str) -> None:
    plain, program = compiled(BASES[base]), compiled(BASES[base] + statements)
    assert program.comm().counts() == plain.comm().counts()
    assert again(program)


def test_the_weight_phase_takes_what_the_backward_has_computed_again() -> None:
    graphs = compiled(BASES["zb"] + "checkpoint blocks.*\n").stages[0].graphs
    backward, weight = (
        {node.name for node in graphs[phase].nodes if node.origin.region}
        for phase in (Phase.BACKWARD, Phase.WEIGHT)
    )
    assert backward and backward.isdisjoint(weight)


class Deep(nn.Module):
    def __init__(self, layers: int, d: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp(d) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def deep(layers: int, segments: int = 0) -> Program:
    statement = f"checkpoint layers.* segments={segments}\n" if segments else ""
    plan = "mesh dp=1\ndata x over dp\n" + statement
    return compiled(plan, Deep(layers), (torch.randn(512, 16),))


def in_use(program: Program) -> int:
    """The most bytes of activations that a step holds at once."""
    memory = program.memory()
    return memory.peak - memory.parameters - memory.gradients - memory.optimizer


@pytest.mark.parametrize("depths", [(8, 32), pytest.param((8, 16, 32, 64), marks=pytest.mark.slow)])
def test_memory_grows_with_the_root_of_the_depth_in_that_many_segments(
    depths: tuple[int, ...],
) -> None:
    whole, parts = [], []
    for depth in depths:
        whole.append(in_use(deep(depth)))
        parts.append(in_use(deep(depth, round(math.sqrt(depth)))))
    for i, depth in enumerate(depths):
        deeper = depth / depths[0]
        assert 0.9 * deeper < whole[i] / whole[0] <= deeper
        assert parts[i] / parts[0] < 1.25 * math.sqrt(deeper)


def test_graphs_grow_by_the_same_for_every_layer() -> None:
    sizes = [
        [len(graph.nodes) for graph in deep(depth, depth // 4).graphs().values()]
        for depth in (8, 12, 16)
    ]
    for first, second, third in zip(*sizes, strict=True):
        assert third - second == second - first


@pytest.mark.parametrize("plan", ["", "stages at blocks.2 over pp microbatches=2\n"])
def test_evaluation_and_other_batches_know_no_regions_or_their_own(plan: str) -> None:
    mesh = "mesh pp=2\ndata tokens, targets\n" if plan else BASES["data"]
    results = []
    for checkpoint in ("", "checkpoint blocks.*.up, blocks.* segments=3\n"):
        run = compiled(f"{mesh}{plan}{checkpoint}").launch(seed=1, new_shapes="compile")
        results.append([run.evaluate(*BATCH), run.step(*OTHER), *run.gradients().values()])
    assert all(map(torch.equal, *results))


class Outputs(nn.Module):
    """Several outputs, buffers, tied and frozen weights, in-place writes, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.norm, self.frozen = nn.BatchNorm1d(16), nn.Linear(16, 16).requires_grad_(False)

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.dropout(self.norm(self.first(x)), 0.3, self.training)
        y = torch.tanh(self.frozen(x).clone())
        y += torch.rand_like(y) * x
        y[:, :4] *= 2
        return self.second(y), y

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, y = self.part(x)
        return {"loss": (x.softmax(-1) * y.exp()).sum(-1).mean(), "x": x, "y": y}


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Outputs()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.body(x)


@pytest.mark.parametrize("statement", ["body", '""', "body keep=[dropout]", "body.*"])
def test_outputs_buffers_and_random_numbers_are_the_same(statement: str) -> None:
    found = []
    for line in ("", f"checkpoint {statement}\n"):
        torch.manual_seed(0)
        plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp\nallow replicate **\n" + line)
        (x,) = rows()
        program = meshwright.compile(Wrapped().double(), plan, (x,), outputs=["x", "y"])
        run = program.launch(seed=5)
        results = [run.step(x) for _ in range(2)][-1]
        found.append([*results, *run.gradients().values(), *run.state_dict().values()])
    torch.manual_seed(0)
    assert len(found[0]) > 8
    assert all(map(torch.equal, *found))


def test_what_is_computed_again_is_shown_and_counted() -> None:
    program = compiled(BASES["tensor"] + "checkpoint blocks.* segments=2 keep=[attention]\n")
    (found,) = program.to_json()["recomputed"]  # type: ignore[misc]
    # What `proj` and `down` lead to is reduced over ranks, and saved.
    assert found["flops"] == 4 * (2 * 32 * 24 * (72 + 96) // 2)
    assert found["regions"] == ("blocks.[0:2]", "blocks.[2:4]")
    assert found["plan_line"] == "<plan>:9"
    text = str(program.explain("blocks.0.up"))
    assert (
        f"computed again in the backward: 1 operator, {2 * 32 * 24 * 48 / 1000:.1f} kFLOP" in text
    )
    assert "linear_2_again" in str(program.timeline())
    assert "linear_2_again: f32[8@dp, 8, 96@tp]" in str(program.graph("stage0.backward"))
    assert not compiled(BASES["data"]).to_json()["recomputed"]


def test_stages_are_chosen_by_what_they_compute_again_and_save() -> None:
    plan = "mesh pp=2\ndata tokens, targets\nstages 2 over pp balance={} microbatches=2\n"
    costs: dict[str, Callable[[str], int]] = {
        by: lambda line, by=by: sum(compiled(plan.format(by) + line).balance.costs)  # type: ignore
        for by in ("flops", "memory")
    }
    line = "checkpoint blocks.*\n"
    assert costs["flops"](line) > 1.15 * costs["flops"]("")
    assert costs["memory"](line) < costs["memory"]("")
