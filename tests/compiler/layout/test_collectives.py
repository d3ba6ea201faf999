"""Every row of the table of collectives, by brute force over all small layouts."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from meshwright.compiler.costs.volume import bytes_sent
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.collectives import (
    COLLECTIVES,
    Transfer,
    plan_transfer,
)
from meshwright.compiler.layout.factors import Factor, whole
from meshwright.compiler.layout.layout import Layout, block_map, replicated, shard
from meshwright.compiler.layout.local_ops import Permute, Reshape, Select
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import WIRES, Start, Wait, Wire
from meshwright.dsl.statements import COUNTED
from tests.compiler.layouts import product, split, unshard
from tests.compiler.spellings import OBLONG, SQUARE, dims, distinct, states
from tests.compiler.wires import run_transfer

MESH = Mesh((("dp", 2), ("tp", 2)))
STATES = ("replicated", "split", "partial", "varying")
DUALS = {"replicated": "replicated", "split": "split", "partial": "varying", "varying": "partial"}


@functools.cache
def layouts(shape, mesh, num_segments):
    """Every layout of a shape in every state."""
    choices = [distinct(dims(size, mesh.names, mesh, num_segments), mesh) for size in shape]
    found = []
    for chosen in itertools.product(*choices):
        axes = [a for dim in chosen for a in Layout((dim,)).split_axes]
        if len(axes) == len(set(axes)):
            found += states(Layout(chosen), mesh)
    return found


CASES = [((4, 2), SQUARE, 1), ((8,), SQUARE, 1), ((6,), SQUARE, 2), ((6, 2), OBLONG, 1)]
case = pytest.mark.parametrize(
    ("shape", "mesh", "num_segments"), CASES, ids=lambda value: str(value)
)


def hold(value, layout, mesh):
    """A random way in which the ranks may hold a value: pending sums are of random terms."""
    pending = layout.partial_axes
    terms = torch.randn(mesh.size(pending), *value.shape, dtype=value.dtype)
    if pending:
        terms -= (terms.sum(0) - value) / len(terms)
    else:
        terms[0] = value
    blocks = layout.drop_states()
    places = [mesh.coords(rank) for rank in range(mesh.num_ranks)]
    return [shard(terms[mesh.position(at, pending)], blocks, mesh, at).clone() for at in places]


def pairing(cotangent, value, layout, mesh):
    """The inner product of a value and its cotangent; copies of replicated elements count once."""
    weights = copy_weights(layout, mesh)
    return sum((g * x * w).sum() for g, x, w in zip(cotangent, value, weights, strict=True))


@functools.cache
def copy_weights(layout, mesh):
    """For each local element of each rank, one over the copies that count as one."""
    blocks = [block_map(layout, mesh, mesh.coords(rank)) for rank in range(mesh.num_ranks)]
    held = torch.bincount(torch.cat([block.flatten() for block in blocks])).double()
    terms = mesh.size((*layout.partial_axes, *layout.varying))
    return [terms / held[block] for block in blocks]


def check_equal_copies(held, layout, mesh):
    """What is replicated or varying is the same on every rank."""
    same = [axis for axis in mesh.names if layout.state(axis) in ("replicated", "varying")]
    for members in mesh.groups(tuple(same)):
        assert all(torch.equal(held[rank], held[members[0]]) for rank in members)


def _state(of_row):
    """The state of an axis that a row calls so."""
    return "split" if of_row == "panels" else of_row


def transfers(kind, shape, mesh, num_segments):
    """(axes, source, target, plan) for each pair of layouts that this kind goes between."""
    row = COLLECTIVES[kind]
    everything = layouts(shape, mesh, num_segments)
    by_states = {}
    for layout in everything:
        by_states.setdefault(tuple(layout.state(axis) for axis in mesh.names), []).append(layout)
    for source in everything:
        for count in range(1, len(mesh.names) + 1):
            for axes in itertools.permutations(mesh.names, count):
                if any(source.state(axis) != _state(row.source) for axis in axes):
                    continue
                wanted = tuple(
                    _state(row.target) if axis in axes else source.state(axis)
                    for axis in mesh.names
                )
                for target in by_states.get(wanted, []):
                    try:
                        plan = plan_transfer(kind, axes, source, target, mesh)
                    except LayoutError:
                        continue
                    yield axes, source, target, plan


PLAIN = [
    name
    for name, row in COLLECTIVES.items()
    if not ("one" in (row.source, row.target) or row.by_count)
]


@pytest.mark.parametrize("kind", [name for name in PLAIN if name != "permute"])
@case
def test_a_collective_keeps_the_value_and_its_adjoint_is_the_one_in_the_table(
    kind, shape, mesh, num_segments
):
    torch.manual_seed(0)
    tried = 0
    for axes, source, target, plan in transfers(kind, shape, mesh, num_segments):
        value = torch.randn(shape, dtype=torch.float64)
        held = hold(value, source, mesh)
        after = run_transfer(plan, held, mesh)
        assert all(tuple(x.shape) == target.local_shape(mesh) for x in after)
        check_equal_copies(after, target, mesh)
        torch.testing.assert_close(unshard(after, target, mesh), value, msg=f"{source} {target}")
        check_adjoint(kind, axes, source, target, held, after, mesh)
        tried += 1
    assert tried


def check_adjoint(kind, axes, source, target, held, after, mesh, *, back=None, shape=None):
    """<g, T x> = <T* g, x> for a random g."""
    cotangent = hold(torch.randn(target.shape, dtype=torch.float64), target.dual(), mesh)
    adjoint = COLLECTIVES[kind].adjoint
    plan = back or plan_transfer(adjoint, axes, target.dual(), source.dual(), mesh)
    returned = run_transfer(plan, cotangent, mesh)
    check_equal_copies(returned, source.dual(), mesh)
    left = pairing(cotangent, after, target, mesh)
    torch.testing.assert_close(left, pairing(returned, held, source, mesh))


@pytest.mark.parametrize("kind", ["pad", "narrow"])
@pytest.mark.parametrize("mesh", [SQUARE, OBLONG], ids=str)
def test_pad_and_narrow_are_adjoint_where_the_value_is_replicated_too(kind, mesh):
    torch.manual_seed(0)
    for base in layouts((6, 2), mesh, 1):
        free = [axis for axis in mesh.names if base.state(axis) == "replicated"]
        for count in range(1, len(free) + 1):
            axes = tuple(free[:count])
            if kind == "pad":
                source, target = base, base.add_partial(axes)
            else:
                source, target = base.add_varying(axes), base
            held = hold(torch.randn(6, 2, dtype=torch.float64), source, mesh)
            after = run_transfer(plan_transfer(kind, axes, source, target, mesh), held, mesh)
            torch.testing.assert_close(unshard(after, target, mesh), unshard(held, source, mesh))
            check_adjoint(kind, axes, source, target, held, after, mesh)


@pytest.mark.parametrize("shift", [0, 1, 2, -1])
@pytest.mark.parametrize("axes", [("a",), ("b",), ("a", "b"), ("b", "a")])
def test_permute_rolls_blocks_and_its_adjoint_shifts_back(axes, shift):
    torch.manual_seed(0)
    size = OBLONG.size(axes)
    layout = split((2 * size, 2), {0: axes})
    value = torch.randn(layout.shape, dtype=torch.float64)
    held = hold(value, layout, OBLONG)
    plan = plan_transfer("permute", axes, layout, layout, OBLONG, shift=shift)
    after = run_transfer(plan, held, OBLONG)
    assert torch.equal(unshard(after, layout, OBLONG), value.roll(2 * shift, 0))
    back = plan_transfer("permute", axes, layout, layout, OBLONG, shift=-shift)
    check_adjoint("permute", axes, layout, layout, held, after, OBLONG, back=back)


@pytest.mark.parametrize("axes", [("a",), ("b",), ("a", "b"), ("b", "a")])
def test_broadcast_takes_the_block_of_its_root_and_its_adjoint_is_reduce(axes):
    torch.manual_seed(0)
    size = OBLONG.size(axes)
    source, target = split((2 * size, 2), {0: axes}), replicated((2, 2)).add_varying(axes)
    value = torch.randn(source.shape, dtype=torch.float64)
    held = hold(value, source, OBLONG)
    for root in range(size):
        plan = plan_transfer("broadcast", axes, source, target, OBLONG, root=root)
        after = run_transfer(plan, held, OBLONG)
        assert torch.equal(unshard(after, target, OBLONG), value[2 * root : 2 * root + 2])
        back = plan_transfer("reduce", axes, target.dual(), source.dual(), OBLONG, root=root)
        check_adjoint("broadcast", axes, source, target, held, after, OBLONG, back=back)
        check_reduce(axes, source, target, root)


def check_reduce(axes, source, target, root):
    """Reduce to the root's block, whose adjoint is the broadcast of that block."""
    pending, blocks = target.dual(), source
    held = hold(torch.randn(pending.shape, dtype=torch.float64), pending, OBLONG)
    plan = plan_transfer("reduce", axes, pending, blocks, OBLONG, root=root)
    after = run_transfer(plan, held, OBLONG)
    result = unshard(after, blocks, OBLONG)
    torch.testing.assert_close(result[2 * root : 2 * root + 2], unshard(held, pending, OBLONG))
    assert result.count_nonzero() == pending.shape[0] * pending.shape[1]
    back = plan_transfer("broadcast", axes, blocks, target, OBLONG, root=root)
    check_adjoint("reduce", axes, pending, blocks, held, after, OBLONG, back=back)


@pytest.mark.parametrize("mesh", [SQUARE, OBLONG], ids=str)
def test_the_cotangent_of_mixed_users_is_the_sum_of_a_reduce_scatter_and_a_slice(mesh):
    """One user takes the gathered value as replicated, the other as varying."""
    torch.manual_seed(0)
    tried = 0
    for axes, source, target, plan in transfers("all_gather_replicated", (6, 4), mesh, 1):
        both = [(target, plan)]
        varying = target.add_varying(axes)
        both.append((varying, plan_transfer("all_gather", axes, source, varying, mesh)))
        check_users(axes, source, both, ("slice", "reduce_scatter"), mesh)
        tried += 1
    assert tried


@pytest.mark.parametrize("mesh", [SQUARE, OBLONG], ids=str)
def test_the_cotangent_of_a_value_that_is_also_varied_is_reduced_in_part(mesh):
    torch.manual_seed(0)
    identity = Transfer((), None, ())
    for source in layouts((6, 4), mesh, 1):
        axes = tuple(axis for axis in mesh.names if source.state(axis) == "replicated")
        if axes:
            varying = source.add_varying(axes)
            plan = plan_transfer("vary", axes, source, varying, mesh)
            check_users(
                axes, source, [(source, identity), (varying, plan)], ("", "all_reduce"), mesh
            )


def check_users(axes, source, users, adjoints, mesh):
    """The sum of the users' cotangents pairs with the value as the users' results do."""
    held = hold(torch.randn(source.shape, dtype=torch.float64), source, mesh)
    left, total = 0.0, [torch.zeros_like(x) for x in hold(torch.zeros(source.shape), source, mesh)]
    for (target, plan), adjoint in zip(users, adjoints, strict=True):
        after = run_transfer(plan, held, mesh)
        grads = hold(torch.randn(target.shape, dtype=torch.float64), target.dual(), mesh)
        left = left + pairing(grads, after, target, mesh)
        if adjoint:
            back = plan_transfer(adjoint, axes, target.dual(), source.dual(), mesh)
            grads = run_transfer(back, grads, mesh)
        total = [a + b for a, b in zip(total, grads, strict=True)]
    check_equal_copies(total, source.dual(), mesh)
    torch.testing.assert_close(left, pairing(total, held, source, mesh))


def test_the_table_is_its_own_adjoint_and_goes_back_between_dual_states():
    for row in COLLECTIVES.values():
        back = COLLECTIVES[row.adjoint]
        assert back.adjoint == row.name
        if "one" not in (row.source, row.target):
            states = (_state(row.target), _state(row.source))
            assert (_state(back.source), _state(back.target)) == tuple(map(DUALS.get, states))


def test_plans_count_the_kinds_that_move_bytes_under_the_names_of_their_rows() -> None:
    between_stages = {"transfer"}
    counted = {row.counted_as for row in COLLECTIVES.values() if row.moves}
    assert counted == set(COUNTED) - between_stages


def test_every_row_names_a_wire_that_there_is_and_every_wire_options_that_there_are() -> None:
    between_stages = {"transfer"}
    assert {row.wire for row in COLLECTIVES.values() if row.wire} == set(WIRES) - between_stages
    assert {option for row in WIRES.values() for option in row.options} <= {*Wire.__slots__}


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter"])
def test_pending_extrema_are_reduced_as_such(kind, reduce):
    source = replicated((4,)).add_partial(["tp"], reduce)
    target = replicated((4,)) if kind == "all_reduce" else split((4,), {0: "tp"})
    held = [torch.randn(4) for _ in range(4)]
    held[2:] = held[:2]
    plan = plan_transfer(kind, ("tp",), source, target, MESH)
    after = unshard(run_transfer(plan, held, MESH), target, MESH)
    assert torch.equal(after, unshard(held, source, MESH))


QKV = Layout((whole(5), product(Factor(3), Factor(12, ("tp",)), Factor(64))))
GROUPED = Layout((((Factor(8, ("tp",)),), (Factor(4, ("tp",)),)),))
WHOLE = Layout((whole(5), whole(2304)))


@pytest.mark.parametrize(
    ("kind", "source", "target", "transfer"),
    [
        (
            "all_gather",
            split((8, 4), {0: "tp"}),
            replicated((8, 4)).add_varying(["tp"]),
            Transfer((), Wire("all_gather", ("tp",)), (Reshape((8, 4)),)),
        ),
        (
            "reduce_scatter",
            replicated((8, 4)).add_partial(["tp"]),
            split((8, 4), {0: "tp"}),
            Transfer((Reshape((2, 4, 4)),), Wire("reduce_scatter", ("tp",)), ()),
        ),
        (
            "slice",
            replicated((8, 4)),
            split((8, 4), {0: "tp"}),
            Transfer((Reshape((2, 4, 4)), Select(0, ("tp",))), None, ()),
        ),
        (
            "all_reduce",
            replicated((8, 4)).add_partial(["tp"]),
            replicated((8, 4)),
            Transfer((), Wire("all_reduce", ("tp",)), ()),
        ),
        (
            "all_gather_replicated",
            QKV,
            WHOLE,
            Transfer(
                (),
                Wire("all_gather", ("tp",)),
                (Reshape((2, 5, 3, 384)), Permute((1, 2, 0, 3)), Reshape((5, 2304))),
            ),
        ),
        (
            "all_to_all",
            split((4, 6), {0: "tp"}),
            split((4, 6), {1: "tp"}),
            Transfer(
                (Reshape((2, 2, 3)), Permute((1, 0, 2))),
                Wire("all_to_all", ("tp",)),
                (Reshape((4, 3)),),
            ),
        ),
    ],
)
def test_a_transfer_does_no_more_than_it_must(kind, source, target, transfer):
    assert plan_transfer(kind, ("tp",), source, target, MESH) == transfer


def test_a_concatenation_is_gathered_segment_by_segment():
    value = torch.randn(12)
    held = hold(value, GROUPED, MESH)
    plan = plan_transfer("all_gather_replicated", ("tp",), GROUPED, replicated((12,)), MESH)
    assert all(torch.equal(x, value) for x in run_transfer(plan, held, MESH))


def test_axes_of_size_one_move_nothing():
    mesh = Mesh((("dp", 1), ("tp", 2)))
    source, target = replicated((4,)).add_partial(["dp"]), replicated((4,))
    assert plan_transfer("all_reduce", ("dp",), source, target, mesh) == Transfer((), None, ())


@pytest.mark.parametrize(
    ("wire", "numel", "sent"),
    [
        (Wire("all_reduce", ("a", "b")), 12, 80),
        (Wire("all_gather", ("b",)), 12, 96),
        (Wire("reduce_scatter", ("b",)), 12, 32),
        (Wire("all_to_all", ("b",)), 12, 32),
        (Wire("permute", ("b",), shift=1), 12, 48),
        (Wire("permute", ("b",), shift=3), 12, 0),
        (Wire("broadcast", ("a",)), 12, 24),
        (Wire("reduce", ("a",)), 12, 24),
    ],
)
def test_bytes_are_those_of_the_bandwidth_optimal_algorithm(wire, numel, sent):
    assert bytes_sent(wire, numel, 4, OBLONG) == sent


@pytest.mark.parametrize(
    ("kind", "source", "target", "text"),
    [
        (
            "all_reduce",
            split((4,), {0: "tp"}),
            replicated((4,)),
            (
                "`all_reduce` over `tp` goes from partial to replicated, not from split to "
                "replicated\n  at: [4@tp] to [4]\n"
                "  help: ask `reshard.collectives` for the collectives between two layouts"
            ),
        ),
        (
            "all_gather_replicated",
            split((8,), {0: ("dp", "tp")}),
            split((8,), {0: "dp"}),
            "",
        ),
        (
            "all_gather_replicated",
            split((8,), {0: ("tp", "dp")}),
            split((8,), {0: "dp"}),
            (
                "`8@(tp, dp)` to `8@dp` is not a move of `tp`\n"
                "  help: ask `reshard.collectives` for the collectives between two layouts"
            ),
        ),
        (
            "all_reduce",
            replicated((8,)).add_partial(["dp", "tp"]),
            replicated((8,)),
            (
                "`all_reduce` over `dp` goes from partial to partial, not from partial to "
                "replicated\n  at: [8] partial(dp, tp) to [8]\n"
                "  help: ask `reshard.collectives` for the collectives between two layouts"
            ),
        ),
        (
            "pad",
            split((8, 8), {0: "tp", 1: "dp"}),
            split((8, 8), {}).add_partial(["tp"]),
            (
                "`pad` over `dp` goes from split to split, not from split to replicated\n"
                "  at: [8@tp, 8@dp] to [8, 8] partial(tp)\n"
                "  help: ask `reshard.collectives` for the collectives between two layouts"
            ),
        ),
        (
            "broadcast",
            split((8,), {0: "tp"}),
            replicated((8,)).add_varying(["tp"]),
            (
                "`broadcast` from `[8@tp]` to `[8] varying(tp)` is not a block of the split value\n"
                "  help: split the larger value into blocks of the smaller one's shape"
            ),
        ),
    ],
)
def test_a_transfer_that_is_not_one_collective_says_so(kind, source, target, text):
    if not text:
        assert plan_transfer(kind, ("tp",), source, target, MESH).wire
        return
    with pytest.raises(LayoutError) as caught:
        plan_transfer(kind, ("tp",), source, target, MESH)
    assert str(caught.value) == text


def test_starts_and_waits_carry_what_a_transport_needs():
    tensor, wire = torch.zeros(2), Wire("all_reduce", ("tp",))
    start, wait = Start(wire, tensor), Wait(7)
    assert (start.wire, start.tensor, wait.handle) == (wire, tensor, 7)
