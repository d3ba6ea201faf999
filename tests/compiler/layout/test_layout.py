"""The layout algebra against block maps of all small layouts."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.factors import Factor, cut, whole
from meshwright.compiler.layout.layout import Layout, block_map, replicated, shard
from meshwright.compiler.layout.mesh import Mesh
from tests.compiler.layouts import product, split, unshard
from tests.compiler.spellings import OBLONG, SQUARE, dims, distinct, states

MESH = Mesh((("dp", 2), ("tp", 2)))


def ownership(layout: Layout, mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """The block maps of all ranks."""
    ranks = range(mesh.num_ranks)
    return tuple(
        tuple(block_map(layout, mesh, mesh.coords(rank)).flatten().tolist()) for rank in ranks
    )


def brute_force_ownership(dim, mesh):
    """Which indices each rank holds, by counting digits, with none of the code under test."""
    held = []
    for rank in range(mesh.num_ranks):
        coords, found, start = mesh.coords(rank), [], 0
        for segment in dim:
            found += [start + i for i in _segment_indices(segment, mesh, coords)]
            start += _product(factor.size for factor in segment)
        held.append(tuple(found))
    return tuple(held)


def _segment_indices(segment, mesh, coords):
    choices = []
    for factor in segment:
        block, length = 0, factor.size
        for axis in factor.axes:
            length //= dict(mesh.axes)[axis]
            block += coords[axis] * length
        choices.append(range(block, block + length))
    for digits in itertools.product(*choices):
        index = 0
        for factor, digit in zip(segment, digits, strict=True):
            index = index * factor.size + digit
        yield index


def _product(numbers):
    result = 1
    for number in numbers:
        result *= number
    return result


@pytest.mark.parametrize("mesh", [SQUARE, OBLONG, Mesh((("a", 2), ("b", 1)))], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 6, 8, 12, 24])
def test_dims_are_equal_exactly_when_their_block_maps_are(mesh, size):
    num_segments = 3 if size <= 6 else 2 if size <= 12 else 1
    by_blocks, by_form = {}, {}
    for dim in dims(size, mesh.names, mesh, num_segments):
        layout = Layout((dim,))
        form = layout.canonical(mesh)
        assert form.canonical(mesh) == form
        assert form.shape == layout.shape == (size,)
        blocks = brute_force_ownership(dim, mesh)
        assert brute_force_ownership(form.dims[0], mesh) == blocks, f"{layout} is not {form}"
        assert by_blocks.setdefault(blocks, form) == form
        assert by_form.setdefault(form, blocks) == blocks
    assert len(by_blocks) == len(by_form)


@pytest.mark.parametrize("mesh", [SQUARE, OBLONG], ids=str)
def test_what_a_rank_holds_follows_from_the_digits(mesh):
    for size in (6, 12):
        for dim in dims(size, mesh.names, mesh, 2):
            layout = Layout((dim,))
            assert ownership(layout, mesh) == brute_force_ownership(dim, mesh), str(layout)
            assert all(len(held) == layout.local_shape(mesh)[0] for held in ownership(layout, mesh))


def test_layouts_of_matrices_are_equal_exactly_when_their_block_maps_are():
    by_blocks = {}
    for rows, columns in itertools.product(dims(4, "ab", SQUARE), dims(6, "ab", SQUARE)):
        if not {a for f in rows[0] for a in f.axes} & {a for f in columns[0] for a in f.axes}:
            form = Layout((rows, columns)).canonical(SQUARE)
            blocks = ownership(Layout((rows, columns)), SQUARE)
            assert by_blocks.setdefault(blocks, form) == form
    assert len(by_blocks) == len(set(by_blocks.values())) == 19


@pytest.mark.parametrize("mesh", [SQUARE, OBLONG], ids=str)
def test_unshard_undoes_shard_in_every_state(mesh):
    shards = distinct(dims(6, mesh.names, mesh, 2), mesh)
    value = torch.arange(18.0, dtype=torch.float64).view(6, 3)
    for dim in shards:
        for layout in states(Layout((dim, whole(3))), mesh):
            held = [shard(value, layout, mesh, mesh.coords(r)) for r in range(mesh.num_ranks)]
            assert all(tuple(x.shape) == layout.local_shape(mesh) for x in held)
            assert torch.equal(unshard(held, layout, mesh), value), str(layout)


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_a_pending_extremum_is_held_by_every_rank(reduce):
    layout = replicated((4,)).add_partial(["dp", "tp"], reduce)
    value = torch.tensor([-3, 1, 4, -1])
    held = [shard(value, layout, MESH, MESH.coords(rank)) for rank in range(4)]
    assert all(torch.equal(x, value) for x in held)
    worse = -100 if reduce == "max" else 100
    assert torch.equal(unshard([held[0], held[1] * 0 + worse, *held[2:]], layout, MESH), value)


def test_a_shard_of_blocks_is_a_view():
    value = torch.randn(8, 6)
    held = shard(value, split((8, 6), {0: "dp", 1: "tp"}), MESH, {"dp": 1, "tp": 1})
    assert held._base is value
    assert torch.equal(held, value[4:, 3:])


@pytest.mark.parametrize(
    ("dim", "canonical"),
    [
        (product(Factor(4, ("tp",)), Factor(32)), "[128@tp]"),
        (product(Factor(2, ("dp",)), Factor(4, ("tp",))), "[8@(dp, tp)]"),
        (product(Factor(4, ("dp",)), Factor(4, ("tp",))), "[4@dp·4@tp]"),
        (product(Factor(3), Factor(12, ("tp",)), Factor(64)), "[3·768@tp]"),
        (((Factor(8),), (Factor(3),), (Factor(4, ("tp",)),)), "[(11 | 4@tp)]"),
        (((Factor(8, ("tp",)),), (Factor(8, ("tp",)),)), "[2·8@tp]"),
        (((Factor(8, ("tp",)),), (Factor(2, ("tp",)),)), "[(8@tp | 2@tp)]"),
        (product(Factor(1), Factor(4, ("one",)), Factor(1)), "[4]"),
        (product(), "[1]"),
    ],
)
def test_the_canonical_form_reads_as_the_design_says(dim, canonical):
    mesh = Mesh((("dp", 2), ("tp", 2), ("one", 1)))
    assert str(Layout((dim,)).canonical(mesh)) == canonical


def test_layouts_print_global_sizes_axes_and_states():
    layout = Layout((cut(8, "dp"), product(Factor(3), Factor(12, ("tp",)), Factor(64))))
    assert str(layout) == "[8@dp, 3·12@tp·64]"
    assert str(replicated((2, 3)).add_partial(["tp"])) == "[2, 3] partial(tp)"
    assert str(replicated((2,)).add_partial(["tp"], "max")) == "[2] partial(max over tp)"
    assert str(replicated(()).add_varying(["tp", "dp"])) == "[] varying(dp, tp)"
    assert str(split((64,), {0: ("row", "col")})) == "[64@(row, col)]"


def test_states_and_duals_exchange_partial_sums_and_varying():
    layout = split((4, 4), {-1: "dp"}).add_partial(["tp"]).add_varying(["pp"])
    assert [layout.state(axis) for axis in ("dp", "tp", "pp", "ep")] == [
        "split",
        "partial",
        "varying",
        "replicated",
    ]
    assert layout.dual() == split((4, 4), {1: "dp"}).add_partial(["pp"]).add_varying(["tp"])
    assert layout.dual().dual() == layout
    assert layout.drop_partial().drop_varying() == split((4, 4), {1: "dp"}) == layout.drop_states()
    assert layout.axes_used == ("dp", "tp", "pp")


def test_dropping_an_axis_leaves_the_other_cuts_where_they_are():
    layout = split((8, 4), {0: ("dp", "tp")})
    assert str(layout.drop_split(["tp"], MESH)) == "[8@dp, 4]"
    assert str(layout.drop_split(["dp"], MESH)) == "[2·4@tp, 4]"


def test_a_copied_layout_hashes_like_the_original():
    layout = split((8, 4), {0: ("dp", "tp")})
    assert copy.deepcopy(layout) == layout
    assert hash(copy.deepcopy(layout)) == hash(layout)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Layout((cut(4, "tp"), cut(2, "tp"))),
            (
                "axis `tp` is used twice in `[4@tp, 2@tp]`\n"
                "  help: split one dim by `tp`, or name another axis for the second"
            ),
        ),
        (
            lambda: split((4,), {0: "tp"}).add_partial(["tp"]),
            (
                "axis `tp` is used twice in `[4@tp] partial(tp)`\n"
                "  help: split one dim by `tp`, or name another axis for the second"
            ),
        ),
        (
            lambda: split((7,), {0: "tp"}).canonical(MESH),
            (
                "`7@tp` does not divide: 7 over 2 ranks\n"
                "  help: use a size that 2 divides, such as 6 or 8"
            ),
        ),
        (
            lambda: split((7,), {0: "ep"}).local_shape(MESH),
            (
                "`7@ep` names axis `ep`, which the mesh (dp=2, tp=2) does not have\n"
                "  help: name one of `dp`, `tp`"
            ),
        ),
        (
            lambda: replicated((7,)).add_varying(["ep"]).canonical(MESH),
            (
                "`[7] varying(ep)` names axis `ep`, which the mesh (dp=2, tp=2) does not have\n"
                "  help: name one of `dp`, `tp`"
            ),
        ),
        (
            lambda: replicated((7,)).add_partial(["dp"]).add_partial(["tp"], "max"),
            (
                "pending reductions of two kinds do not commute\n"
                "  at: partial(sum over dp, max over tp)\n"
                "  help: reduce over one of the axes first"
            ),
        ),
        (
            lambda: replicated((7,)).add_partial(["dp"], "max").dual(),
            (
                "a pending max has no cotangent\n"
                "  at: [7] partial(max over dp)\n"
                "  help: reduce it first, or detach it"
            ),
        ),
    ],
)
def test_a_layout_that_can_not_be_says_why(make, text):
    with pytest.raises(LayoutError) as caught:
        make()
    assert str(caught.value) == text
