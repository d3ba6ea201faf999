"""Weights that are stored in another layout than the one in which operators use them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.graph.ir import Graph, MeshOp
from meshwright.compiler.graph.transfers import moves
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.layout.factors import cut, dim_axes
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.public import Program
from meshwright.passes import driver
from meshwright.passes.statements.draft import Draft, Pin, input_key
from tests.equivalence import Comparison, check_equal, implicit_gathers
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, Mlp, real, rows, tokens

AXIS = "dp"


def stored_split(draft: Draft) -> Draft:
    """Every weight stored split over `AXIS`, whatever the layout in which operators use it."""
    found = {}
    for node in draft.graph.inputs:
        if node.of_model and node.args[0] != "constant":
            pin = draft.inputs.get(input_key(node))
            used = pin.layout if pin else replicated(node.tensor.shape)
            if used.dims:
                found[input_key(node)] = Pin(split_further(used, draft.mesh), ())
    return replace(draft, stored=found)


def split_further(used: Layout, mesh: Mesh) -> Layout:
    """`used` with one dim more split, made longer where it does not divide."""
    dims = list(used.dims)
    whole = [i for i, dim in enumerate(dims) if not dim_axes(dim)]
    dim = max(whole, key=lambda i: used.shape[i]) if whole else 0
    (*major, last) = dims[dim][0]
    axes = (*last.axes, AXIS)
    ranks = mesh.size(axes)
    dims[dim] = ((*major, *cut(-(-last.size // ranks) * ranks, *axes)[0]),)
    return used.with_dims(dims)


@pytest.fixture(autouse=True)
def _stored(monkeypatch: pytest.MonkeyPatch) -> None:
    place = driver.PASSES.index(driver.partition)
    rest = (each for each in driver.PASSES[place:] if each is not driver.fuse)
    passes = (*driver.PASSES[:place], stored_split, *rest)
    monkeypatch.setattr(driver, "PASSES", passes)


def compiled(model: nn.Module, example: tuple[Tensor, ...], plan: str) -> Program:
    parsed = meshwright.Plan.parse(plan)
    return meshwright.compile(model.double(), parsed, example=example)


def moves_over_axis(graph: Graph) -> list[tuple[str, str]]:
    """Each collective over `AXIS`: its kind, and the weight that it gathers, if it does."""
    found = []
    for node in graph.nodes:
        if moves(node) and AXIS in node.kwargs["axes"]:
            source = input_behind(node)
            assert isinstance(node.op, MeshOp)
            found.append((node.op.name, source.args[1] if source else ""))
    return found


PLANS = {
    "data": "mesh dp=2\n" + GPT_DATA,
    "data-tensor": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR,
    "sequence": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "sequence blocks.* over tp\n",
}


@pytest.mark.parametrize("name", PLANS)
def test_a_gpt_of_stored_split_weights_trains_as_on_one_device(name: str) -> None:
    torch.manual_seed(0)
    program = check_equal(Gpt(), tokens, PLANS[name])
    assert implicit_gathers(program) == []
    for stored in program.parameters.values():
        assert AXIS in stored.layout.split_axes and AXIS not in stored.used.split_axes


@pytest.mark.parametrize("name", PLANS)
def test_each_weight_is_gathered_once_each_way_and_its_gradient_scattered_once(name: str) -> None:
    program = compiled(Gpt(), tokens(), PLANS[name])
    forward, backward = (moves_over_axis(graph) for graph in program.graphs().values())
    names = sorted(program.parameters)
    gathers = [name for kind, name in forward if kind == "all_gather_replicated"]
    assert sorted(gathers) == names
    assert Counter(kind for kind, _ in forward) == {
        "all_gather_replicated": len(names),
        "all_reduce": 2,
    }
    again = [name for kind, name in backward if kind == "all_gather_replicated"]
    # A backward takes neither a bias nor the table of a lookup; `wte` is that of a linear too.
    unread = [name for name in names if name.endswith("bias") or name.startswith("wpe")]
    assert sorted([*again, *unread]) == names
    assert Counter(kind for kind, _ in backward) == {
        "all_gather_replicated": len(again),
        "reduce_scatter": len(names),
    }


def test_the_gathers_and_scatters_send_the_shards_that_ranks_lack() -> None:
    program = compiled(Mlp(), rows(), "mesh dp=4\ndata x over dp\n")
    size = sum(p.numel() for p in Mlp().parameters()) * 8 * 3 // 4
    unread = (16 + 32 + 16 * 32) * 8 * 3 // 4
    sent = Counter[str]()
    for each in program.comm():
        sent[f"{each.phase} {each.kind}"] += each.bytes
    assert sent["forward all_gather"] == size
    assert sent["backward all_gather"] == size - unread
    assert sent["backward reduce_scatter"] == size


class Deep(nn.Module):
    def __init__(self, layers: int = 32, d: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.sum()


def test_whole_weights_are_let_go_after_their_last_use() -> None:
    program = compiled(Deep(), (real(4, 32),), "mesh dp=4\ndata x over dp\n")
    memory = program.memory()
    whole = sum(p.numel() for p in Deep().parameters()) * 8
    assert memory.parameters == whole // 4
    held = memory.parameters + 2 * memory.gradients + memory.optimizer
    assert memory.peak - held < whole // 4


def test_explain_shows_both_layouts_and_what_leads_from_one_to_the_other() -> None:
    program = compiled(Mlp(), rows(), "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\n")
    text = str(program.explain("up.weight"))
    assert "up.weight: f64[32@tp, 16@dp], used as f64[32@tp, 16]  <- <plan>:3" in text
    kinds = [(each.phase, each.kind) for each in program.explain("up.weight").collectives]
    assert kinds == [("forward", "all_gather"), ("backward", "reduce_scatter")]


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a tied weight, a frozen one and a norm of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 7)
        self.scale, self.shift = nn.Parameter(torch.rand(3, 7)), nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.again = nn.Linear(7, 5)
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        w = self.scale.prod(0)
        y = self.down(torch.tanh(self.up(x * w)) * self.frozen)
        return self.again(y + self.shift).square().mean() + 0.1 * w.square().sum()


@pytest.mark.parametrize("mesh", ["dp=2", "dp=3", "dp=4"])
def test_weights_that_do_not_divide_are_stored_with_zeros(mesh: str) -> None:
    torch.manual_seed(0)
    plan = f"mesh {mesh}\ndata x over dp\nallow replicate **\n"
    program = check_equal(Odd(), lambda: (real(12, 7),), plan)
    assert program.parameters["up.weight"].paddings


class Tracked(nn.Module):
    """Keeps a running mean of its inputs, and takes it off them."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 5)
        self.register_buffer("mean", torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.up(x - self.mean).square().mean()


def test_a_buffer_that_is_written_is_stored_split_too() -> None:
    torch.manual_seed(0)
    program = check_equal(Tracked(), lambda: (real(6, 7),), "mesh dp=2\ndata x over dp\n")
    assert program.buffers["mean"].layout.split_axes == (AXIS,)


def test_a_checkpoint_of_stored_split_weights_loads_under_another_plan_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batches = Gpt().double(), [tokens() for _ in range(3)]
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    stored = compiled(model, batches[0], PLANS["data-tensor"])
    monkeypatch.undo()
    plain = compiled(model, batches[0], "mesh tp=4\n" + GPT_TENSOR)
    for number, program in enumerate((stored, plain, stored)):
        run = program.launch()
        ours = run.optimizer(torch.optim.AdamW, lr=1e-2)
        if number:
            run.load(tmp_path / str(number - 1), ours)
        run.step(*batches[number])
        reference(*batches[number]).backward()
        for each in (ours, optimizer):
            each.step()
            each.zero_grad()
        run.save(tmp_path / str(number), ours)
    compare = Comparison(1e-10)
    for name, value in reference.state_dict().items():
        compare(name, run.state_dict()[name], value)
    compare.report()
