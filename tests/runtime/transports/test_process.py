"""Real processes over shared memory and Gloo, beside the virtual mesh."""

from __future__ import annotations

import math

import pytest

from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.errors import MismatchError, RunError
from meshwright.runtime.transports.gloo import ALGORITHMS, choose
from meshwright.runtime.world.digest import check_digests, check_world
from tests.runtime.forked import Forked

SHARED, STAGED = "MESHWRIGHT_SHARED_MEMORY", "MESHWRIGHT_THROUGH_HOST"
CARRIED = {
    "shared memory": {SHARED: "1"},
    "gloo": {SHARED: "0"},
    "host memory": {SHARED: "1", STAGED: "1"},
}


@pytest.mark.parametrize("by", CARRIED)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_collective_gives_what_the_virtual_mesh_gives(
    forked: Forked, num_ranks: int, by: str
) -> None:
    module, environment = "tests.runtime.transports.every_wire", CARRIED[by]
    for output in forked.outputs(module, num_ranks, **environment):
        assert output == "the same bits\n400 cases\n"


@pytest.mark.parametrize("kind", sorted({row.kind for row in ALGORITHMS}))
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 8, 64])
def test_every_kind_has_an_algorithm_at_every_size(kind: str, started: bool, size: int) -> None:
    assert choose(kind, size, started)[-1][0] == math.inf


def test_a_world_of_another_size_is_an_error_with_both_numbers() -> None:
    with pytest.raises(RunError) as caught:
        check_world(Mesh((("dp", 2), ("tp", 4))), 4)
    assert str(caught.value) == (
        "the mesh `dp=2, tp=4` has 8 ranks, but 4 processes run\n"
        "  help: start 8 processes (`torchrun --nproc-per-node 8`), or change the mesh"
    )
    check_world(Mesh((("dp", 2), ("tp", 4))), 8)


def test_different_programs_are_an_error_that_names_the_ranks_that_differ() -> None:
    with pytest.raises(MismatchError) as caught:
        check_digests(["a" * 64, "b" * 64, "a" * 64, "c" * 64], 0)
    assert str(caught.value) == (
        "ranks 1 and 3 compiled a different program than ranks 0 and 2\n"
        "  ranks 0 and 2: digest aaaaaaaaaaaa\n"
        "  rank 1: digest bbbbbbbbbbbb\n"
        "  rank 3: digest cccccccccccc\n"
        "  help: give every rank the same model, plan, example, backend and versions, and the same "
        "seeds where the model draws numbers in Python"
    )
    check_digests(["a" * 64] * 4, 0)
