"""Changes of layout: every pair of small layouts, and the chains that plans rely on."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch

from meshwright.compiler.costs.volume import bytes_sent
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.layout.factors import Factor, cut, whole
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import Collective, collectives, cost
from tests.compiler.layout.test_collectives import (
    CASES,
    check_equal_copies,
    hold,
    layouts,
    pairing,
    transfers,
)
from tests.compiler.layouts import split, unshard
from tests.compiler.spellings import SQUARE
from tests.compiler.wires import run_transfer

MESH = Mesh((("dp", 2), ("tp", 4)))


@pytest.mark.parametrize(("shape", "mesh", "num_segments"), CASES, ids=str)
def test_any_layout_becomes_any_other_and_its_cotangent_comes_back(shape, mesh, num_segments):
    torch.manual_seed(0)
    everything = layouts(shape, mesh, num_segments)
    if num_segments > 1:
        everything = everything[::4]
    for source, target in itertools.product(everything, repeat=2):
        lost = [axis for axis in source.varying if target.state(axis) in ("replicated", "partial")]
        if lost:
            with pytest.raises(LayoutError, match="cannot become"):
                collectives(source, target, mesh)
        else:
            check_chain(source, target, mesh)


def check_chain(source, target, mesh):
    chain = collectives(source, target, mesh)
    assert bool(chain) == (source.canonical(mesh) != target.canonical(mesh))
    assert all(a.target == b.source for a, b in itertools.pairwise(chain))
    value = torch.randn(source.shape, dtype=torch.float64)
    held = first = hold(value, source, mesh)
    for collective in chain:
        held = run_transfer(collective.transfer(mesh), held, mesh)
    check_equal_copies(held, target, mesh)
    torch.testing.assert_close(unshard(held, target, mesh), value)
    cotangent = last = hold(torch.randn(source.shape, dtype=torch.float64), target.dual(), mesh)
    for collective in reversed(chain):
        cotangent = run_transfer(collective.adjoint().transfer(mesh), cotangent, mesh)
    left = pairing(last, held, target, mesh)
    torch.testing.assert_close(left, pairing(cotangent, first, source, mesh))
    check_cost(source, target, chain, mesh)


def check_cost(source, target, chain, mesh):
    """The cost is what the wires of the chain and of its adjoints send."""
    assert cost(source, target, 4, mesh, False) == pytest.approx(sum(sent(s, mesh) for s in chain))
    both = sum(sent(collective, mesh) + sent(collective.adjoint(), mesh) for collective in chain)
    assert cost(source, target, 4, mesh, True) == pytest.approx(both)


def sent(collective, mesh):
    """The bytes of a collective's wire, with elements of 4 bytes, by running its first half."""
    transfer = collective.transfer(mesh)
    if transfer.wire is None:
        return 0
    held = torch.zeros(collective.source.local_shape(mesh))
    given = run_transfer(type(transfer)(transfer.before, None, ()), [held] * mesh.num_ranks, mesh)
    return bytes_sent(transfer.wire, given[0].numel(), 4, mesh)


def spelt(source, target, mesh=MESH):
    return [
        f"{collective.kind}({', '.join(collective.axes)})"
        for collective in collectives(source, target, mesh)
    ]


X = replicated((8, 16))


@pytest.mark.parametrize(
    ("source", "target", "chain"),
    [
        (X.add_partial(["dp", "tp"]), X, ["all_reduce(dp, tp)"]),
        (X.add_partial(["tp"]), split((8, 16), {1: "tp"}), ["reduce_scatter(tp)"]),
        (
            X.add_partial(["dp", "tp"]),
            split((8, 16), {1: "tp"}),
            ["reduce_scatter(tp)", "all_reduce(dp)"],
        ),
        (
            X.add_partial(["dp", "tp"]),
            split((8, 16), {0: "dp", 1: "tp"}),
            ["reduce_scatter(dp, tp)"],
        ),
        (split((8, 16), {0: "tp"}), split((8, 16), {1: "tp"}), ["all_to_all(tp)"]),
        (
            split((8, 16), {0: ("dp", "tp")}),
            split((8, 16), {1: ("tp", "dp")}),
            ["all_to_all(dp, tp)"],
        ),
        (split((8, 16), {0: "tp"}), X, ["all_gather_replicated(tp)"]),
        (split((8, 16), {0: "tp"}), X.add_varying(["tp"]), ["all_gather(tp)"]),
        (split((8, 16), {0: "dp", 1: "tp"}), X, ["all_gather_replicated(dp, tp)"]),
        (X, split((8, 16), {0: "dp", 1: "tp"}), ["slice(dp, tp)"]),
        (X, X.add_varying(["dp", "tp"]), ["vary(dp, tp)"]),
        (X.add_varying(["tp"]), split((8, 16), {0: "tp"}), ["narrow(tp)"]),
        (X.add_partial(["tp"]), X.add_varying(["tp"]), ["all_reduce(tp)", "vary(tp)"]),
        (split((8, 16), {0: "tp"}), X.add_partial(["tp"]), ["pad(tp)"]),
        (
            split((8, 16), {0: "dp"}),
            split((8, 16), {0: "tp"}),
            ["all_gather_replicated(dp)", "slice(tp)"],
        ),
        (
            split((8, 16), {0: "dp", 1: "tp"}),
            split((8, 16), {0: "tp", 1: "dp"}),
            ["all_gather_replicated(dp)", "all_to_all(tp)", "slice(dp)"],
        ),
        (
            split((8, 16), {0: "tp"}),
            X.add_varying(["dp", "tp"]),
            ["vary(dp)", "all_gather(tp)"],
        ),
        (X, X, []),
        (split((8, 16), {0: ("dp",)}), Layout((cut(8, "dp"), whole(16))), []),
    ],
)
def test_the_chain_between_two_layouts_is_short_and_fused(source, target, chain):
    assert spelt(source, target) == chain


@pytest.mark.parametrize("differentiable", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("shape", [(4, 4), (8,)], ids=str)
def test_a_chain_sends_at_most_a_third_more_than_the_shortest_path(shape, differentiable):
    everything = layouts(shape, SQUARE, 1)
    edges = collective_edges(shape, SQUARE, differentiable)
    best = 0
    for source in everything:
        shortest = distances(source.canonical(SQUARE), edges)
        for target in everything:
            lost = set(source.varying) & {*target.partial_axes, *replicated_axes(target)}
            if not lost and set(target.partial) <= set(source.partial):
                sent_now = cost(source, target, 1, SQUARE, differentiable)
                least = shortest[target.canonical(SQUARE)]
                assert least - 1e-9 <= sent_now <= 4 / 3 * least + 1e-9, f"{source} to {target}"
                best += sent_now <= least + 1e-9
    assert best > 500


def replicated_axes(layout):
    return [axis for axis in SQUARE.names if layout.state(axis) == "replicated"]


def collective_edges(shape, mesh, differentiable):
    """For each layout, those that one collective leads to, with the elements it sends."""
    edges = {}
    for kind in set(COLLECTIVES) - {"permute", "broadcast", "reduce"}:
        for axes, source, target, _ in transfers(kind, shape, mesh, 1):
            collective = Collective(kind, axes, source.canonical(mesh), target.canonical(mesh))
            size = sent(collective, mesh) + (
                sent(collective.adjoint(), mesh) if differentiable else 0
            )
            edges.setdefault(collective.source, []).append((size / 4, collective.target))
    return edges


def distances(start, edges):
    """Dijkstra's shortest paths from one layout."""
    found, heap, order = {}, [(0, 0, start)], itertools.count(1)
    while heap:
        distance, _, layout = heapq.heappop(heap)
        if layout not in found:
            found[layout] = distance
            for size, following in edges.get(layout, ()):
                heapq.heappush(heap, (distance + size, next(order), following))
    return found


def test_dispatching_tokens_to_experts_is_one_all_to_all():
    source = split((8, 4, 2, 3), {0: "tp"})
    assert spelt(source, split((8, 4, 2, 3), {1: "tp"})) == ["all_to_all(tp)"]


def test_segments_that_end_inside_blocks_are_gathered_first():
    source = Layout((((Factor(4, ("a",)),), (Factor(2, ("a",)),)),))
    assert spelt(source, split((6,), {0: "a"}), SQUARE) == ["all_gather_replicated(a)", "slice(a)"]


def test_a_slice_is_free_forward_and_a_gather_backward():
    target = split((8, 16), {0: "tp"})
    assert cost(X, target, 4, MESH, False) == 0
    assert cost(X, target, 4, MESH, True) == 3 * 32 * 4
    assert cost(X, X, 4, MESH, True) == 0


def test_a_pending_max_costs_no_adjoint():
    assert cost(X.add_partial(["dp"], "max"), X, 4, MESH, True) == 128 * 4
    assert spelt(X.add_partial(["dp"], "max"), X.add_partial(["dp"])) == [
        "all_reduce(dp)",
        "pad(dp)",
    ]


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (
            X.add_varying(["tp"]),
            X,
            (
                "a value that varies over `tp` cannot become replicated\n"
                "  at: [8, 16] varying(tp) to [8, 16]\n"
                "  help: start from the value before it was varied"
            ),
        ),
        (
            X,
            replicated((16, 8)),
            (
                "`[8, 16]` and `[16, 8]` are layouts of different shapes\n"
                "  help: reshape the value before it is resharded"
            ),
        ),
        (
            X,
            X.add_partial(["tp"], "max"),
            (
                "a pending max cannot be made from `[8, 16]`\n"
                "  at: [8, 16] to [8, 16] partial(max over tp)\n"
                "  help: leave the value as it is"
            ),
        ),
    ],
)
def test_what_can_not_be_resharded_says_why(source, target, text):
    with pytest.raises(LayoutError) as caught:
        collectives(source, target, MESH)
    assert str(caught.value) == text


def test_every_kind_that_a_chain_may_hold_is_in_the_table():
    kinds = {
        collective.kind
        for target in layouts((4, 2), SQUARE, 1)
        for collective in collectives_from(target)
    }
    assert kinds <= set(COLLECTIVES)


def collectives_from(target):
    return collectives(replicated((4, 2)), target, SQUARE)
