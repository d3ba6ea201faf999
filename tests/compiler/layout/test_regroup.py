"""Reshapes of layouts against torch's views of the shards."""

from __future__ import annotations

import itertools

import pytest
import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.factors import Factor, cut, whole
from meshwright.compiler.layout.layout import Layout, block_map, replicated, shard
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.regroup import reshape
from tests.compiler.layouts import product, split
from tests.compiler.spellings import OBLONG, SQUARE, dims, distinct

MESH = Mesh((("dp", 2), ("tp", 2)))
SHAPES = [(24,), (4, 6), (6, 4), (2, 12), (3, 8), (2, 3, 4), (4, 1, 6), (1, 24), (2, 2, 6)]


def layouts(shape, mesh, num_segments=1):
    """Every distinct layout of a shape."""
    choices = [distinct(dims(size, mesh.names, mesh, num_segments), mesh) for size in shape]
    for chosen in itertools.product(*choices):
        try:
            yield Layout(chosen)
        except LayoutError:
            continue


def ownership(layout, mesh):
    return tuple(
        tuple(block_map(layout, mesh, mesh.coords(rank)).flatten().tolist())
        for rank in range(mesh.num_ranks)
    )


def check_view(layout, new_shape, mesh):
    """The view of each shard is the shard of the view."""
    found = reshape(layout, new_shape, mesh)
    assert found.shape == new_shape
    value = torch.arange(24).view(layout.shape)
    for rank in range(mesh.num_ranks):
        coords = mesh.coords(rank)
        local = shard(value, layout, mesh, coords).reshape(found.local_shape(mesh))
        expected = shard(value.view(new_shape), found, mesh, coords)
        assert torch.equal(local, expected), f"{layout} to {found}"


@pytest.mark.parametrize("mesh", [SQUARE, OBLONG], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_view_of_a_shard_is_the_shard_of_the_view(mesh, shape):
    possible = {new: {ownership(x, mesh) for x in layouts(new, mesh)} for new in SHAPES}
    succeeded = 0
    for layout in layouts(shape, mesh):
        for new_shape in SHAPES:
            try:
                check_view(layout, new_shape, mesh)
            except LayoutError:
                assert ownership(layout, mesh) not in possible[new_shape], f"{layout} {new_shape}"
            else:
                succeeded += 1
    assert succeeded > len(SHAPES)


def test_concatenations_survive_reshapes_that_end_at_their_top():
    succeeded = 0
    for dim in distinct(dims(6, "ab", SQUARE, 2), SQUARE):
        for minor in (whole(4), cut(4, "a"), product(Factor(2), Factor(2, ("b",)))):
            try:
                layout = Layout((dim, minor))
            except LayoutError:
                continue
            for new_shape in SHAPES:
                try:
                    check_view(layout, new_shape, SQUARE)
                except LayoutError:
                    continue
                succeeded += len(dim) > 1
    assert succeeded > 100


@pytest.mark.parametrize(
    ("layout", "new_shape", "text"),
    [
        (Layout((cut(4, "dp"), cut(8, "tp"), whole(5))), (32, 5), "[4@dp·8@tp, 5]"),
        (split((128,), {0: "tp"}), (4, 32), "[4@tp, 32]"),
        (split((128,), {0: "tp"}), (1, 4, 1, 32, 1), "[1, 4@tp, 1, 32, 1]"),
        (split((4, 1, 6), {0: "dp", 2: "tp"}), (4, 6), "[4@dp, 6@tp]"),
        (
            Layout((product(Factor(3), Factor(12, ("tp",)), Factor(64)),)),
            (3, 12, 64),
            "[3, 12@tp, 64]",
        ),
        (split((4, 6), {0: "dp"}).add_partial(["tp"]), (24,), "[24@dp] partial(tp)"),
        (replicated((4, 6)).add_varying(["tp"]), (24,), "[24] varying(tp)"),
        (
            Layout((whole(2), ((Factor(8, ("tp",)),), (Factor(4, ("tp",)),)))),
            (2, 1, 12),
            "[2, 1, (8@tp | 4@tp)]",
        ),
        (
            Layout((((Factor(8, ("tp",)),), (Factor(4, ("tp",)),)),)),
            (6, 2),
            "[(4@tp | 2@tp), 2]",
        ),
        (
            Layout((((Factor(4, ("tp",)),), (Factor(2, ("tp",)),)), whole(2))),
            (12,),
            "[(8@tp | 4@tp)]",
        ),
        (replicated(()), (1, 1), "[1, 1]"),
        (replicated((0, 4)), (4, 0, 2), "[4, 0, 2]"),
    ],
)
def test_a_view_regroups_factors(layout, new_shape, text):
    assert str(reshape(layout, new_shape, MESH)) == text


@pytest.mark.parametrize(
    ("layout", "new_shape", "text"),
    [
        (
            split((384,), {0: "tp"}),
            (3, 128),
            (
                "`384@tp` cannot be cut into `3·128` with `tp` over 2 ranks\n"
                "  at: [384@tp]\n"
                "  help: write the dim as `3·128@tp`"
            ),
        ),
        (
            split((384,), {0: ("dp", "tp")}),
            (3, 128),
            (
                "`384@(dp, tp)` cannot be cut into `3·128` with `dp` over 2 ranks\n"
                "  at: [384@(dp, tp)]\n"
                "  help: write the dim as `3·128@(dp, tp)`"
            ),
        ),
        (
            split((8, 2304), {0: "dp", 1: "tp"}),
            (8, 3, 12, 64),
            (
                "`2304@tp` cannot be cut into `3·12·64` with `tp` over 2 ranks\n"
                "  at: [8@dp, 2304@tp]\n"
                "  help: write the dim as `3·12@tp·64`"
            ),
        ),
        (
            split((4, 30), {1: "tp"}),
            (4, 3, 2, 5),
            (
                "`30@tp` cannot be cut into `3·2·5` with `tp` over 2 ranks\n"
                "  at: [4, 30@tp]\n"
                "  help: write the dim as `3·2@tp·5`"
            ),
        ),
        (
            split((6, 4), {1: "tp"}),
            (4, 6),
            (
                "`4@tp` cannot be cut into `6` with `tp` over 2 ranks\n"
                "  at: [6, 4@tp]\n"
                "  help: leave the dim whole over `tp`"
            ),
        ),
        (
            Layout((whole(2), ((Factor(8, ("tp",)),), (Factor(4, ("tp",)),)))),
            (24,),
            (
                "the concatenation `(8@tp | 4@tp)` cannot be cut into `24`\n"
                "  at: [2, (8@tp | 4@tp)]\n"
                "  help: split the tensor at the segments before the reshape"
            ),
        ),
        (
            split((4, 6), {0: "tp"}),
            (5, 5),
            (
                "`[4@tp, 6]` has 24 elements, `5·5` has 25\n"
                "  help: reshape to a shape of as many elements"
            ),
        ),
    ],
)
def test_a_view_through_a_cut_says_what_to_write(layout, new_shape, text):
    with pytest.raises(LayoutError) as caught:
        reshape(layout, new_shape, MESH)
    assert str(caught.value) == text


def test_the_composite_that_an_error_suggests_works():
    composite = Layout((product(Factor(3), Factor(128, ("tp",))),))
    assert str(reshape(composite, (3, 128), MESH)) == "[3, 128@tp]"
