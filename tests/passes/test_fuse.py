"""The pass `fuse`: small weights of a block are sent together, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.graph.ir import Graph, Node, Phase
from meshwright.compiler.graph.transfers import moves
from meshwright.passes import fuse
from tests.equivalence import check_equal
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, real, tokens
from tests.passes.stages import check_documented, shown

PLAN = "mesh dp=2\ndata x over dp\nzero 3 over dp\n"


class Layers(nn.Module):
    def __init__(self, d: int = 16, inner: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, inner) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x).square().mean() for layer in self.layers), torch.zeros(()))


def forward(model: nn.Module, x: Tensor, plan: str = PLAN) -> Graph:
    program = meshwright.compile(model, meshwright.Plan.parse(plan), example=(x,))
    return program.stages[0].graphs[Phase.FORWARD]


def sent(graph: Graph, axis: str = "dp") -> list[Node]:
    """The gathers and scatters over an axis."""
    kinds = "all_gather", "reduce_scatter"
    found = [n for n in graph.nodes if moves(n) and axis in n.kwargs["axes"]]
    return [n for n in found if any(kind in str(n.op) for kind in kinds)]


def test_the_docstring_shows_a_layer_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    after = forward(Layers(), torch.randn(8, 16))
    monkeypatch.setattr(fuse, "SMALL_BYTES", 0)
    before = forward(Layers(), torch.randn(8, 16))
    names = "all_gather_replicated", "all_gather_replicated_1"
    check_documented(fuse, shown(before, *names), shown(after, "together", *names))


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(
    "plan",
    [
        "mesh dp=2\n" + GPT_DATA,
        "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "sequence blocks.* over tp\n",
        "mesh dp=2\n" + GPT_DATA + "accumulate 2\n",
    ],
    ids=["data", "sequence", "microbatches"],
)
def test_a_block_has_one_gather_and_one_scatter_for_what_is_small(plan: str, level: int) -> None:
    torch.manual_seed(0)
    program = check_equal(Gpt(), tokens, f"{plan}zero {level} over dp\n")
    for graph in program.graphs().values():
        counts: dict[tuple[str, str, object], int] = {}
        for node in sent(graph):
            module = next((m for m, _ in node.origin.modules if m.startswith("blocks.")), "")
            if module:
                # What tensor parallelism splits otherwise, or leaves pending, travels apart.
                states = {(n.placed.partial_axes, n.placed.varying) for n in node.args}
                key = module[:8], str(node.op), frozenset(states)
                counts[key] = counts.get(key, 0) + 1
        assert set(counts.values()) <= {1}


def test_large_weights_travel_alone() -> None:
    graph = forward(Layers(64, 4096), torch.randn(8, 64))
    assert [len(node.args) for node in sent(graph)] == [1, 1, 1, 1]


def test_types_are_not_mixed() -> None:
    model = Layers()
    model.layers[0].bias = nn.Parameter(torch.randn(64).double())
    model.forward = lambda x: (x @ model.layers[0].weight.T + model.layers[0].bias).sum()  # type: ignore[method-assign]
    graph = forward(model, torch.randn(8, 16))
    assert all(len({n.tensor.dtype for n in node.args}) == 1 for node in sent(graph))


class Weighed(nn.Linear):
    """A linear map of rows that count for their part of all weights, and of the largest."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (weights / weights.sum() / weights.amax())


class Weighing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Weighed(16, 16)])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.layers[0](x, weights).square().sum()


def test_a_sum_and_a_maximum_travel_apart() -> None:
    torch.manual_seed(0)
    plan = "mesh dp=2\ndata x, weights over dp\naccumulate 2\n"
    check_equal(Weighing(), lambda: (real(8, 16), real(8, 16).abs()), plan)


class Transposed(nn.Module):
    """A layer whose weight is split along its last dim, since the first does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 5, bias=False), nn.Linear(8, 5)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).square().mean()


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_that_are_rearranged_arrive_in_their_places(ranks: int) -> None:
    torch.manual_seed(0)
    plan = f"mesh dp={ranks}\ndata x over dp\nzero 3 over dp\n"
    check_equal(Transposed(), lambda: (real(8, 8),), plan)
