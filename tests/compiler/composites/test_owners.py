"""Rows to the owners of their groups: which of them ranks exchange."""

from __future__ import annotations

import pytest
import torch

from meshwright.compiler.composites.owners import FromOwners, OwnedGroups, ToOwners
from meshwright.compiler.graph.ir import MeshOp, TensorType
from meshwright.compiler.graph.slots import Slot
from meshwright.compiler.layout.factors import Dim, Factor, cut, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.allowed import allowed
from meshwright.compiler.placing.rules.notation import Call, Operand

SQUARE = Mesh((("a", 2), ("b", 2)))
IDS = torch.int64


def call_of(op: MeshOp, slices: Dim, rows: Dim, owners: int, axes: tuple[str, ...]) -> Call:
    """A call on rows that are laid out so, of 8 groups."""
    (g,), (s,) = Layout((slices,)).shape, Layout((rows,)).shape
    group = Operand(TensorType((g, s, 2), IDS), Layout((slices, rows, cut(2))))
    blocks = g, owners, 2 * s
    if op == OwnedGroups.op:
        args, results = (Slot(0), 8, owners, 2 * s, axes), TensorType(blocks, IDS)
        return Call(op, args, (), (group,), (results,), SQUARE)
    given = (g, s, 6) if op == ToOwners.op else (*blocks, 6)
    found = (*blocks, 6) if op == ToOwners.op else (g, s, 2, 6)
    x = Operand(TensorType(given, torch.float64), Layout(tuple(map(cut, given))))
    args = (Slot(0), Slot(1), 8, owners, *([2 * s] if op == ToOwners.op else []), axes)
    return Call(op, args, (), (x, group), (TensorType(found, torch.float64),), SQUARE)


LAID_OUT: dict[str, tuple[bool, Dim, Dim, int, tuple[str, ...]]] = {
    "rows over the owners": (True, cut(1), cut(8, "a"), 2, ("a",)),
    "rows over two axes": (True, cut(1), cut(8, "a", "b"), 4, ("a", "b")),
    "a slice on each rank": (True, cut(2, "b"), cut(8, "a"), 2, ("a",)),
    "two slices on each rank": (False, cut(4, "b"), cut(8, "a"), 2, ("a",)),
    "axes in another order": (False, cut(1), cut(8, "b", "a"), 4, ("a", "b")),
    "one axis of two": (False, cut(1), cut(8, "a"), 4, ("a", "b")),
    "rows over others": (False, cut(1), cut(8, "b"), 2, ("a",)),
    "rows that are apart": (False, cut(1), ((Factor(2), Factor(4, ("a",))),), 2, ("a",)),
    "two owners on a rank": (False, cut(1), cut(8, "a"), 4, ("a",)),
}


@pytest.mark.parametrize("op", [ToOwners.op, OwnedGroups.op, FromOwners.op], ids=str)
@pytest.mark.parametrize("name", LAID_OUT)
def test_rows_are_exchanged_where_ranks_have_a_block_of_one_slice_each(
    name: str, op: MeshOp
) -> None:
    is_exchanged, slices, rows, owners, axes = LAID_OUT[name]
    call = call_of(op, slices, rows, owners, axes)
    found = [each for each in allowed(call) if dim_axes(each.operands[-1].dims[1])]
    assert bool(found) == is_exchanged
    for each in found:
        blocks = each.operands[0] if op == FromOwners.op else each.results[0]
        assert blocks is not None
        assert blocks.dims[1] == cut(owners, *axes)
        assert not blocks.partial


@pytest.mark.parametrize("op", [ToOwners.op, FromOwners.op], ids=str)
def test_where_rows_are_whole_each_rank_has_those_of_its_owners(op: MeshOp) -> None:
    call = call_of(op, cut(1), cut(8), 2, ("a",))
    operand = call.operands[0]
    if op == FromOwners.op:
        split = Layout((cut(1), cut(2, "a"), *operand.layout.dims[2:]))
        operand = Operand(operand.type, split)
    call = Call(op, call.args, (), (operand, call.operands[1]), call.results, SQUARE)
    results = {str(each.results[0]) for each in allowed(call)}
    wanted = "[1, 8, 2, 6] partial(a)" if op == FromOwners.op else "[1, 2@a, 16, 6]"
    assert wanted in results


def test_a_rank_has_owners_that_follow_one_another() -> None:
    call = call_of(FromOwners.op, cut(1), cut(8), 4, ("a",))
    apart = ((Factor(2), Factor(2, ("a",))),)
    split = Layout((cut(1), apart, *call.operands[0].layout.dims[2:]))
    operand = Operand(call.operands[0].type, split)
    call = Call(FromOwners.op, call.args, (), (operand, call.operands[1]), call.results, SQUARE)
    assert {each.operands[0].dims[1] for each in allowed(call)} == {cut(4), cut(4, "a")}
