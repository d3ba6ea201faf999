"""Where the rows of activations are split in products in blocks."""

from __future__ import annotations

import pytest

from meshwright.compiler.composites.grid import Dims, rows_over
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.factors import Dim, cut
from meshwright.compiler.layout.mesh import Mesh

MESH = Mesh((("row", 2), ("col", 2), ("z", 4)))
PAIR = (*cut(4), *cut(4))


@pytest.mark.parametrize(
    ("dims", "axes", "expected"),
    [
        ((cut(8, "col"), cut(6)), ("row",), (cut(8, "row"), cut(6))),
        ((cut(3), cut(6, "row")), ("row",), (cut(3), cut(6, "row"))),
        ((cut(4, "row"), cut(8)), ("row", "z"), (cut(4, "row"), cut(8, "z"))),
        ((cut(8), cut(8)), ("z", "row"), (cut(8, "z", "row"), cut(8))),
        ((PAIR, cut(6)), ("row",), (PAIR, cut(6, "row"))),
    ],
)
def test_an_axis_cuts_the_first_dim_that_divides_further(
    dims: Dims, axes: tuple[str, ...], expected: Dims
) -> None:
    assert rows_over(dims, axes, "col", MESH) == expected


@pytest.mark.parametrize("first", [cut(2), cut(2, "row")])
def test_a_dim_has_room_for_the_axis_that_comes_instead(first: Dim) -> None:
    found = rows_over((first, cut(8)), ("row",), "z", MESH, swapped=True)
    assert found == (cut(2), cut(8, "row"))


def test_rows_that_divide_nowhere_are_an_error() -> None:
    with pytest.raises(LayoutError, match=r"none of the leading dims .* divides over `z`"):
        rows_over((cut(4, "row"), cut(6)), ("row", "z"), "col", MESH)
