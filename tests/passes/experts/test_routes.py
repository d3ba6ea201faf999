"""Routes on one rank, and the same ones token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Experts
from meshwright.passes.experts.mixture import Settings
from meshwright.passes.experts.replace import settings
from meshwright.passes.experts.routes import ROUTES, Routed, Routing, auxiliary_loss, metrics
from tests.passes.experts.dense import Dense

GROUPS, TOKENS = 3, 10


class ByToken(Dense):
    """Routes alone."""

    bias = None

    def __init__(self, routing: Routing) -> None:
        nn.Module.__init__(self)
        self.settings = Settings(routing)


def logits(experts: int) -> Tensor:
    """Few values, so that many are equal, and an expert that most tokens prefer."""
    found = torch.randint(
        3, (GROUPS, TOKENS, experts), generator=torch.Generator().manual_seed(experts)
    ).double()
    found[..., -1] += 1
    return found


def kept(routed: Routed, slot: Tensor, count: int) -> Tensor:
    """The weights of the choices that have a slot, by expert."""
    weight = routed.weight.masked_fill(slot < 0, 0)
    empty = torch.zeros(*weight.shape[:2], count, dtype=weight.dtype)
    return empty.scatter_add(-1, routed.expert.expand_as(weight), weight)


def slots(routed: Routed, routing: Routing) -> Tensor:
    """Unlike one another in each group, of those that are kept."""
    capacity = routing.capacity(TOKENS)
    found = torch.where(routed.position < capacity, routed.expert * capacity + routed.position, -1)
    for group in found:
        taken = group[group >= 0].tolist()
        assert len(set(taken)) == len(taken)
        assert all(0 <= each < routing.count * capacity for each in taken)
    return found


ROUTINGS = [
    Routing("topk", 4, 2, 1.0),
    Routing("topk", 6, 3, 0.5),
    Routing("topk", 12, 9, 0.7),
    Routing("topk", 1, 1, 1.25),
    Routing("topk", 4, 1, 100.0),
    Routing("switch", 4, 1, 0.01),
    Routing("switch", 5, 1, 1.25),
    Routing("prototype", 6, 2, 1.0),
    Routing("prototype", 6, 3, 0.6),
    Routing("prototype", 4, 4, 0.5),
    Routing("expert_choice", 4, 1, 1.3),
    Routing("expert_choice", 5, 2, 1.0),
]


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_tokens_go_where_they_go_one_by_one(routing: Routing) -> None:
    scores, reference = logits(routing.count), ByToken(routing)
    routed = ROUTES[routing.route](scores, routing)
    slot = slots(routed, routing)
    expected = [torch.stack(each) for each in zip(*map(reference.route, scores), strict=True)]
    weights, first, chosen, shares = expected
    torch.testing.assert_close(kept(routed, slot, routing.count), weights)
    torch.testing.assert_close(routed.shares, shares)
    loss = auxiliary_loss(routed)
    assert (loss is None) == (routing.route == "expert_choice")
    if loss is not None:
        torch.testing.assert_close(loss, reference.auxiliary(first, shares))
    load, (dropped, entropy) = metrics(routed, slot >= 0).split([routing.count, 2])
    found = {"load": load, "dropped": dropped, "entropy": entropy}
    for key, value in reference.reported(weights, chosen, shares).items():
        torch.testing.assert_close(found[key], torch.as_tensor(value), check_dtype=False)


def test_an_even_router_has_an_auxiliary_loss_of_one() -> None:
    for routing in (Routing("topk", 5, 2, 1.0), Routing("prototype", 10, 2, 1.0)):
        # Token t prefers expert t, and no token prefers any by much.
        each = routing.count // (routing.top if routing.route == "prototype" else 1)
        own = torch.eye(each).repeat(TOKENS // each, routing.count // each)
        loss = auxiliary_loss(ROUTES[routing.route](own.expand(GROUPS, -1, -1), routing))
        torch.testing.assert_close(loss, torch.tensor(1.0))


def test_a_second_expert_is_taken_as_often_as_twice_its_weight() -> None:
    routing = Routing("topk", 4, 2, 4.0, random_second=True)
    scores = torch.tensor([3.0, 3.0 + torch.tensor(0.25).log(), 0.0, 0.0]).expand(2, 4000, 4)
    torch.manual_seed(0)
    routed = ROUTES["topk"](scores, routing)
    torch.testing.assert_close(routed.weight[0, 0], torch.tensor([0.8, 0.2]))
    taken = (routed.position >= 0) & (routed.position < routing.capacity(4000))
    assert taken[..., 0].all()
    assert abs(taken[..., 1].float().mean() - 0.4) < 0.02
    # Those that are not taken have no place among those that are.
    last = routed.position[..., 1].masked_fill(~taken[..., 1], -1).amax(1)
    torch.testing.assert_close(last + 1, taken[..., 1].sum(1))


def test_a_capacity_is_a_share_of_a_group_rounded_up() -> None:
    assert Routing("topk", 4, 2, 1.25).capacity(8) == 5
    assert Routing("topk", 4, 2, 1.1).capacity(20) == 11  # not 12: 11.000000000000002
    assert Routing("topk", 8, 1, 0.01).capacity(8) == 1
    assert Routing("switch", 2, 1, 9.0).capacity(8) == 8


def test_gradients_reach_the_router_through_weights_and_the_loss_alone() -> None:
    for routing in ROUTINGS:
        scores = logits(routing.count).requires_grad_()
        routed = ROUTES[routing.route](scores, routing)
        assert not routed.expert.requires_grad and not routed.position.requires_grad
        assert not metrics(routed, slots(routed, routing) >= 0).requires_grad
        weights = routed.weight.square().sum()
        (grad,) = torch.autograd.grad(weights, scores, retain_graph=True)
        # One expert, of all or of each prototype, has a weight of 1.
        alone = routing.count == (routing.top if routing.route == "prototype" else 1)
        assert (grad.abs().sum() > 0) == (not alone), routing


def test_a_bias_takes_the_place_of_the_auxiliary_loss() -> None:
    text = "mesh ep=2\nexperts a over ep count=4 balance=bias\n"
    (statement,) = Plan.parse(text).of(Experts)
    found = settings(statement)
    assert (found.weight, found.rate) == (0, 0.001)


def test_a_bias_chooses_experts_and_is_not_in_their_weights() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, 0.0]).expand(1, 3, 4)
    routed = ROUTES["topk"](scores, Routing("topk", 4, 1, None), torch.tensor([-1.0, 0, 0, 0.5]))
    assert routed.expert.unique().tolist() == [3]
    torch.testing.assert_close(routed.weight, scores.softmax(-1)[..., 3:])
