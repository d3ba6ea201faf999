"""The pass `route`: permutations that are undone are left out, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.passes.rewriting import recognise, route
from tests.equivalence import check_equal, implicit_gathers
from tests.models import real, rows
from tests.passes import examples
from tests.passes.examples import Routed, grouped_mm
from tests.passes.stages import check_documented, shown, stages

SPLIT = "mesh dp=2\ndata x over dp\n"
INNER = "shard up [e, d, f@tp]\nshard down [e, f@tp, d]\nshard scale [f@tp]\n"


def test_the_docstring_shows_a_mixture_of_experts_before_and_after() -> None:
    found = stages(Routed(), examples.rows(), SPLIT)
    check_documented(
        route,
        shown(
            found["normalise"],
            *("argsort", "floor_divide", "index", "bucketize", "unsqueeze", "grouped_mm"),
            *("argsort_1", "index_2"),
        ),
        shown(found["route"], "topk_1", "grouped_mm", "view_3", "view_5_1", "sum"),
    )


@pytest.mark.parametrize(
    "plan",
    [
        SPLIT,
        "mesh dp=4\ndata x over dp\n",
        "mesh tp=2\n" + INNER,
        "mesh dp=2, tp=2\ndata x over dp\n" + INNER,
    ],
)
def test_a_mixture_of_experts_routes_within_each_shard(plan: str) -> None:
    program = check_equal(Routed(), rows, plan)
    assert implicit_gathers(program) == []
    counts = program.comm().counts()
    # The loss and the bucket of gradients; over tp the sum of the experts and the gradient of the
    # shares.
    assert counts.get("all_reduce[dp]", 0) == (2 if "dp" in plan else 0)
    assert counts.get("all_reduce[tp]", 0) == (2 if "tp" in plan else 0)
    assert set(counts) <= {"all_reduce[dp]", "all_reduce[tp]"}


Body = Callable[["Experts", Tensor, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """A router and one matrix an expert; `body` is what is done with them."""

    def __init__(self, body: Body, count: int = 4) -> None:
        super().__init__()
        self.gate, self.body = nn.Linear(16, count, bias=False), body
        self.up, self.bias = (
            nn.Parameter(torch.randn(count, 16, 16)),
            nn.Parameter(torch.rand(4, 16)),
        )

    def forward(self, x: Tensor) -> Tensor:
        share, ids = self.gate(x).softmax(-1).topk(2)
        return self.body(self, x, share, ids).square().mean()

    def ends(self, ids: Tensor) -> Tensor:
        counts = torch.histc(ids.flatten().double(), self.up.shape[0], 0, self.up.shape[0])
        return counts.cumsum(0).int()


def sorted_by_value(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Biases by expert, and an inverse that is written into an empty tensor."""
    ordered, order = ids.view(-1).sort()
    y = grouped_mm(x[order // 2], m.up, m.ends(ordered)) + m.bias[ordered]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return ((y * share.view(-1)[order, None])[back]).view(*ids.shape, -1).sum(1)


def added_in_place(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Rows are added where they came from; the shares multiply what goes in."""
    order = torch.argsort(ids.flatten(), stable=True)
    token = torch.arange(x.shape[0]).repeat_interleave(2)[order]
    rows = x.index_select(0, token) * share.flatten()[order].unsqueeze(-1)
    y = grouped_mm(rows, m.up, m.ends(ids))
    return x.index_add(0, token, y)


def scattered(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Indices broadcast over features, as torchtitan has them, experts before rows."""
    order = torch.argsort(ids.t().reshape(-1), stable=True)
    token = (order % x.shape[0]).reshape(-1, 1).expand(-1, 16)
    y = grouped_mm(x.gather(0, token), m.up, m.ends(ids.t()))
    y = y * share.t().reshape(-1).gather(0, order).unsqueeze(1)
    return torch.zeros_like(x).scatter_add(0, token, y)


def counted_by_one_hot(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    order = ids.flatten().argsort()
    ends = F.one_hot(ids, 4).sum((0, 1)).cumsum(0)
    y = grouped_mm(x[order.div(2, rounding_mode="floor")], m.up, ends.int())
    back = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0]))
    return (y.index_select(0, back).view(-1, 2, 16) * share.unsqueeze(-1)).sum(1)


def counted_by_comparison(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    flat = ids.flatten()
    order = flat.argsort()
    ends = (flat.unsqueeze(-1) == torch.arange(4)).sum(0).cumsum(0)
    y = F.layer_norm(grouped_mm(x[order // 2], m.up, ends.int()), (16,))
    out = torch.empty_like(y).index_copy(0, order, y)
    return (out.unflatten(0, (-1, 2)) * share[..., None]).sum(1)


def dropped(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Rows of little share go to an expert that is not there."""
    flat = torch.where(share < 0.3, 4, ids).flatten()
    order = flat.argsort()
    ends = torch.histc(flat.double(), 4, 0, 3).cumsum(0).int()
    y = grouped_mm(x[order // 2], m.up, ends) * share.flatten()[order, None]
    token = (order // 2).unsqueeze(1).expand(-1, 16)
    return torch.zeros_like(x).scatter_reduce(0, token, y, "sum")


def one_expert_each(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    order = ids[:, 0].argsort()
    counts = torch.zeros(4, dtype=torch.int64).scatter_add(
        0, ids[:, 0], torch.ones(ids.shape[0], dtype=torch.int64)
    )
    y = torch.zeros_like(x)
    y[order] = grouped_mm(x[order], m.up, counts.cumsum(0).int()) * share[order, :1]
    return y


def two_in_turn(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    return sorted_by_value(m, added_in_place(m, x, share, ids), share, ids)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "body",
    [
        sorted_by_value, added_in_place, scattered, counted_by_one_hot, counted_by_comparison,
        dropped, one_expert_each, two_in_turn,
    ],
)  # fmt: skip
def test_routing_stays_within_a_shard_however_it_is_written(body: Body, ranks: int) -> None:
    plan = f"mesh dp={ranks}\ndata x over dp\n"
    program = check_equal(Experts(body), lambda: rows(12), plan)
    assert implicit_gathers(program) == []
    assert program.comm().counts() == {"all_reduce[dp]": 2}


class Layer(nn.Module):
    """Sequences whose tokens are routed, and added to what is routed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(16), Routed()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts.routed(self.norm(x).flatten(0, 1)).view(x.shape)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


SPLIT_EXPERTS = """
shard layers.*.experts.up [e, d, f@tp]
shard layers.*.experts.down [e, f@tp, d]
shard layers.*.experts.scale [f@tp]
"""


@pytest.mark.parametrize("experts", ["", SPLIT_EXPERTS])
def test_tokens_of_split_sequences_are_routed_where_they_are(experts: str) -> None:
    plan = "mesh dp=2, tp=2\ndata x over dp\nsequence layers.* over tp\n" + experts
    program = check_equal(Layers(), lambda: (real(4, 6, 16),), plan)
    assert implicit_gathers(program) == []
    gathers = {kind for kind in program.comm().counts() if "gather" in kind}
    assert gathers == ({"all_gather[tp]"} if experts else set())


def other_groups(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Rows in one order, the groups of another."""
    order = ids.flatten().argsort(descending=True)
    return grouped_mm(x[order // 2], m.up, m.ends(ids))[order.argsort()].view(-1, 2, 16).sum(1)


def negative(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Groups that are not counted come first: every row is one group further on."""
    flat = torch.where(share < 0.3, -1, ids).flatten()
    order = flat.argsort()
    ends = torch.histc(flat.double(), 4, 0, 3).cumsum(0).int()
    return grouped_mm(x[order // 2], m.up, ends)[order.argsort()].view(-1, 2, 16).sum(1)


def ranked(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """A ranking loss: the place of a score counts."""
    scores, order = share[:, 0].sort()
    return (scores * torch.arange(1, len(scores) + 1)).unsqueeze(1) + x[order]


def middle(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    return share.flatten().sort().values[share.shape[0]] * x


def shuffled(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Rows in one order meet rows in another, and are put back by a third."""
    order, other = share[:, 0].argsort(), share[:, 1].argsort()
    return (x[order] * share[other, :1])[order.argsort()]


def neighbours(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    order = share[:, 0].argsort()
    return (x * share[:, :1])[order].cumsum(0)[order.argsort()]


def put_twice(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Rows overwrite each other in the order of the sort."""
    order = ids.flatten().argsort(stable=True)
    rows = (m.bias[ids.flatten()] * share.view(-1, 1))[order]
    return torch.zeros_like(x).index_put((order // 2,), rows)


def capped(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Only the first three rows of an expert count."""
    ordered, order = ids.flatten().sort(stable=True)
    first = torch.searchsorted(ordered, torch.arange(4))
    kept = (torch.arange(len(order)) - first[ordered] < 3).unsqueeze(1)
    return (x[order // 2] * kept * share.view(-1, 1)[order])[order.argsort()].view(-1, 2, 16).sum(1)


def expert_choice(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Each expert takes the rows that want it most, of all of them."""
    scores, tokens = m.gate(x).t().topk(3)
    y = torch.einsum("ecd,edf->ecf", x[tokens], m.up) * scores.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, tokens.flatten(), y.flatten(0, 1))


def binned(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """Groups of numbers in a hundred bins between the least and the largest."""
    order = ids.flatten().argsort()
    ends = torch.histc(ids.flatten().double()).cumsum(0)
    group = torch.bucketize(torch.arange(ids.numel()), ends.int(), right=True)
    y = x[order // 2] * (group + share.flatten()[order]).unsqueeze(1)
    return torch.zeros_like(x).index_add(0, order // 2, y)


@pytest.mark.parametrize(
    "body",
    [
        other_groups,
        negative,
        ranked,
        middle,
        shuffled,
        neighbours,
        put_twice,
        capped,
        expert_choice,
        binned,
    ],
)
def test_an_order_that_counts_is_kept(body: Body) -> None:
    program = check_equal(Experts(body), lambda: rows(12), SPLIT)
    assert implicit_gathers(program) != []


def test_a_sort_whose_results_are_only_summed_is_left_out() -> None:
    def body(m: Experts, x: Tensor, share: Tensor, ids: Tensor) -> Tensor:
        return share.flatten().sort(descending=True).values.square().sum() * x

    program = check_equal(Experts(body), lambda: rows(12), SPLIT)
    assert implicit_gathers(program) == []


def test_more_rows_than_are_worked_out_are_routed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognise, "_LONGEST", 4)
    found = stages(Routed(), examples.rows(), SPLIT)["route"]
    assert not any("sort" in str(node.op) for node in found.nodes)


def test_a_model_without_a_sort_is_as_it_was() -> None:
    graph = stages(Routed(), rows(), SPLIT)["route"]
    assert route.route(graph) is graph


class Grouped(nn.Module):
    """Torch's own grouped products: of rows, of columns, of what is contracted, and of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(small(4, 16, 8)), nn.Parameter(small(16, 16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        y = F.grouped_mm(x, self.w, offs=ends)
        columns = F.grouped_mm(self.w.transpose(1, 2), x.t(), offs=ends)
        contracted = F.grouped_mm(x.t(), x * self.v[:8], offs=ends)
        pairs = F.grouped_mm(self.w, self.w.detach().transpose(1, 2))
        # Torch's own derivatives of them want gradients that are not expanded.
        return sum((2 * each).sum() for each in (y, columns, contracted, pairs))


def small(*shape: int) -> Tensor:
    """Numbers whose sums of products bfloat16 holds exactly."""
    return torch.randint(-1, 2, shape).bfloat16()


@pytest.mark.parametrize("plan", [SPLIT, "mesh tp=2\nshard w [e, k, n@tp]\n"])
def test_groups_that_do_not_follow_from_a_sort_are_right_too(plan: str) -> None:
    batch = (small(8, 16), torch.tensor([2, 5, 5, 8], dtype=torch.int32))
    check_equal(Grouped(), batch, plan, dtype=torch.bfloat16, steps=1, tolerance=1e-2)
