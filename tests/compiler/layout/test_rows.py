"""Rows that travel by count: what each rank gives and takes, and the adjoint of an exchange."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshwright.compiler.autodiff.adjoints import cotangents
from meshwright.compiler.autodiff.vjp import VjpContext
from meshwright.compiler.codegen.instructions import Call, Exchange, Start
from meshwright.compiler.codegen.lowering import lowered
from meshwright.compiler.codegen.overlap import overlap
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import (
    INPUT,
    Builder,
    MeshOp,
    Node,
    Origin,
    Output,
    OutputKind,
    TensorType,
)
from meshwright.compiler.graph.transfers import transfers_of
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.rows import Room, Rows
from meshwright.compiler.layout.wires import Wire, everyone
from meshwright.compiler.placing.emit import Emitter
from tests.compiler.layouts import split

MESH = Mesh((("ep", 2), ("tp", 2)))


def numbered(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def test_each_rank_takes_what_ranks_send_in_their_order_and_then_zeros() -> None:
    first = Rows(numbered(1, 2, 3), [2, 1], [2, 0], 4)
    second = Rows(numbered(4, 5, 6), [0, 2], [1, 2], 4)
    taken = everyone(Wire("exchange_rows", ("ep",)), [first, second])
    assert [each.squeeze(1).tolist() for each in taken] == [[1, 2, 0, 0], [3, 4, 5, 0]]


def test_rows_that_have_no_room_are_cut_off_and_zeros_come_for_those_that_are_missing() -> None:
    first = Rows(numbered(1, 2), [1, 2], [1, 1], 1)
    second = Rows(numbered(4, 5), [1, 1], [2, 1], 4)
    taken = everyone(Wire("exchange_rows", ("ep",)), [first, second])
    assert [each.squeeze(1).tolist() for each in taken] == [[1], [2, 0, 5, 0]]


def test_the_most_rows_of_all_microbatches_are_noted() -> None:
    room, counts = Room(), torch.tensor([[1, 1]])
    for received in ([[2, 3]], [[1, 1]]):
        made = room.counted(7, 4, torch.zeros(2, 1), counts, torch.tensor(received))
    assert (made.sent, made.received, made.maximum) == ([1, 1], [1, 1], 4)
    assert room.needed == {7: 5}


def exchange(builder: Builder, layout: Layout, target: Layout) -> Node:
    """Of rows on `ep`, with counts that have a rank of their own."""
    counts = TensorType((2, 2), torch.int64)
    sent = builder.emit(INPUT, ("argument", "sent"), type=counts, layout=split((2, 2), {0: "ep"}))
    back = builder.emit(INPUT, ("argument", "back"), type=counts, layout=split((2, 2), {1: "ep"}))
    kind = TensorType(layout.shape, torch.float32)
    x = builder.emit(
        INPUT, ("argument", "x"), type=kind, layout=layout, requires_grad=True, name="x"
    )
    return builder.emit(
        MeshOp("exchange_rows"),
        (x,),
        {"axes": ("ep",), "sent": sent, "received": back},
        type=TensorType(target.shape, torch.float32),
        layout=target,
    )


def test_the_adjoint_sends_rows_back_by_the_same_counts() -> None:
    builder = Builder("a graph", MESH)
    node = exchange(builder, split((4, 6), {0: "ep"}), split((10, 6), {0: "ep"}))
    grad = builder.emit(INPUT, ("cotangent", "y"), type=node.type, layout=node.placed.dual())
    emitter = Emitter(builder, backward=True)
    found = cotangents(VjpContext(emitter, node, (node,), (grad,), Origin()))
    back, *others = found
    assert back is not None and others == [None, None]
    assert back.op == node.op and back.args == (grad,)
    assert back.tensor.shape == (4, 6)
    assert back.kwargs["sent"] is node.kwargs["received"]
    assert back.kwargs["received"] is node.kwargs["sent"]
    transfers_of(back, MESH)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (split((4, 6), {1: "ep"}), split((8, 6), {1: "ep"})),
        (split((4, 6), {0: ("ep", "tp")}), split((8, 6), {0: ("tp", "ep")})),
        (split((4, 6), {0: "ep", 1: "tp"}), split((8, 6), {0: ("ep", "tp")})),
        (split((4, 6), {0: "ep"}), split((8, 4), {0: "ep"})),
    ],
    ids=["features", "another order", "features become rows", "other features"],
)
def test_rows_are_cut_alike_before_and_after(source: Layout, target: Layout) -> None:
    node = exchange(Builder("a graph", MESH), source, target)
    with pytest.raises(LayoutError, match=r"`exchange_rows` over `ep`"):
        transfers_of(node, MESH)


def test_an_exchange_waits_for_its_counts_where_rows_are_there_before() -> None:
    builder, cut = Builder("a graph", MESH), split((4, 6), {0: "ep"})
    given = exchange(builder, cut, split((10, 6), {0: "ep"}))
    x, sent, back = given.operands()
    relu, neg = torch.ops.aten.relu.default, torch.ops.aten.neg.default
    rows = builder.emit(relu, (x,), type=x.type, layout=cut)
    counts = builder.emit(neg, (sent,), type=sent.type, layout=sent.layout)
    kwargs = {"axes": ("ep",), "sent": counts, "received": back}
    found = builder.copy(given, {}, args=(rows,), kwargs=kwargs)
    body = overlap(lowered(builder.graph([Output(OutputKind.OUTPUT, "", found)]))).body
    order = [each.node for each in body if isinstance(each, (Call, Start, Exchange))]
    assert order == [rows, counts, found]
