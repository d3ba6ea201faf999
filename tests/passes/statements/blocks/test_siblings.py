"""Products in blocks of one value, put together."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.graph.flops import flops
from meshwright.compiler.public import Program
from meshwright.passes.statements.blocks import siblings
from tests.equivalence import check_equal
from tests.models import real
from tests.passes.stages import check_documented, shown, stages

GRID = "mesh row=2, col=2\nsumma ** over (row, col)\n"


class Attention(nn.Module):
    def __init__(self, d: int, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        if apart:
            self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        else:
            self.qkv = nn.Linear(d, 3 * d)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.q(x), self.k(x), self.v(x)) if self.apart else self.qkv(x).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (8, -1)).transpose(1, 2) for each in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self, d: int = 32, apart: bool = True) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(d), Attention(d, apart)
        self.gate, self.up, self.down = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return (x + self.down(F.silu(self.gate(x)) * self.up(x))).square().mean()


def inputs(d: int = 32) -> tuple[Tensor]:
    return (real(8, 8, d),)


def compiled(plan: str, model: nn.Module | None = None, d: int = 32) -> Program:
    model = model or Net(d)
    return meshwright.compile(model.double(), meshwright.Plan.parse(plan), inputs(d))


def panels(program: Program, module: str) -> Counter[tuple[str, str]]:
    """The elements that a module and those in it send in steps of products, by phase and kind."""
    found: Counter[tuple[str, str]] = Counter()
    for each in program.comm().moved:
        if each.module.startswith(module) and each.kind in ("broadcast", "reduce"):
            found[each.phase, each.kind] += each.bytes // 8
    return found


def test_the_docstring_shows_products_before_and_after() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(48, 24, bias=False), nn.Linear(48, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) * self.k(x)).sum()

    found = stages(Pair(), (real(8, 8, 48).float(),), GRID)
    before, after = found["stages"], found["siblings"]
    names = "summa", "getitem", "getitem_1"
    check_documented(siblings, shown(before, "summa", "summa_1"), shown(after, *names))


@pytest.mark.parametrize("q", [2, 4])
def test_weights_apart_send_what_one_weight_would(q: int) -> None:
    plan = f"mesh row={q}, col={q}\nsumma ** over (row, col)\n"
    apart = panels(compiled(plan), "attn")
    fused = compiled(plan + "summa attn.qkv over (row, col) as (3 heads hd)\n", Net(apart=False))
    assert apart == panels(fused, "attn")


@pytest.mark.parametrize(
    "plan",
    [
        "mesh row=2, col=4\nsumma ** over (row, col)\n",
        "mesh x=2, y=2, z=2\nsumma ** over (x, y, z)\n",
        "mesh depth=2, row=2, col=2\nsumma ** over (row, col) depth=depth\n",
        GRID + "checkpoint attn\nzero 3 over row\n",
    ],
)
def test_weights_of_one_input_train_as_on_one_device(plan: str) -> None:
    check_equal(Net(), inputs, plan, steps=2)


def test_a_cube_gathers_an_input_once_and_sums_its_cotangents_once() -> None:
    program = compiled("mesh x=2, y=2, z=2\nsumma ** over (x, y, z)\n")
    own = [each for each in program.comm().moved if each.module == "attn"]
    found = Counter((each.phase, each.kind, each.axes) for each in own)
    assert found["forward", "all_gather", ("y",)] == 1
    assert found["backward", "reduce_scatter", ("y",)] == 1


@pytest.mark.parametrize(
    ("more", "together"),
    [
        ("", [3, 2]),
        ("checkpoint attn\n", [3, 2]),
        ("checkpoint attn.q\n", [2, 2]),
        ('checkpoint attn keep=["k.linear"]\n', [2, 2]),
        ("shard attn.v <- [8@row, 8, 32]\nallow replicate **\n", [2, 2]),
    ],
)
def test_what_the_plan_tells_apart_stays_apart(more: str, together: list[int]) -> None:
    found = stages(Net(), (real(8, 8, 32).float(),), GRID + more)["siblings"].nodes
    merged = [node for node in found if isinstance(node.type, tuple) and "summa" in str(node.op)]
    assert [len(node.type) for node in merged if isinstance(node.type, tuple)] == together


def test_products_of_two_stages_stay_apart() -> None:
    plan = GRID.replace("mesh", "mesh pp=2,") + "stages at attn.v over pp\n"
    check_equal(Net(), inputs, plan, steps=1)


def test_a_weight_that_is_not_trained_has_no_gradient_and_its_siblings_have() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.attn.k.requires_grad_(False)
            self.gate.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                unused = self.up(x)
            return super().forward(x) + (self.gate(x) * unused).mean()

    check_equal(Frozen(), inputs, GRID, steps=2)


@pytest.mark.parametrize(
    "plan",
    [
        "mesh depth=2, row=2, col=4\nsumma ** over (row, col) depth=depth\n",
        "mesh x=2, y=1, z=4\nsumma ** over (x, y, z)\n",
    ],
)
def test_products_count_what_their_steps_compute(plan: str) -> None:
    found = stages(Net(), (real(16, 8, 32).float(),), plan)
    whole, steps = (
        sum(flops(node, graph.mesh) for node in graph.nodes)
        for graph in (found["differentiate"], found["lower"])
    )
    assert whole == steps > 0
