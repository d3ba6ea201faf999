"""Which collectives of a graph are one transfer of the generated code."""

from __future__ import annotations

import pytest
import torch

from meshwright.compiler.codegen.lowering import lowered
from meshwright.compiler.graph.ir import (
    INPUT,
    Arg,
    Builder,
    Graph,
    MeshOp,
    Node,
    Op,
    Origin,
    Output,
    OutputKind,
    TensorType,
)
from meshwright.compiler.graph.transfers import moves, transfer_key
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from tests.compiler.layouts import split

MESH = Mesh((("dp", 4),))
CUT, WHOLE = split((8,), {0: ("dp",)}), replicated((8,))


def two_of(*calls: tuple[str, Layout, dict[str, Arg]]) -> Graph:
    """Collectives over `dp` of one value that is split over it."""
    builder, kind = Builder("step.forward", MESH), TensorType((8,), torch.float32)
    given = ("argument", "x")
    x = builder.emit(INPUT, given, type=kind, layout=CUT, origin=Origin(), name="x")
    made = [
        builder.emit(
            MeshOp(name),
            (x,),
            {"axes": ("dp",), **options},
            type=kind,
            layout=layout,
            origin=Origin(),
        )
        for name, layout, options in calls
    ]
    return builder.graph(Output(OutputKind.OUTPUT, str(i), node) for i, node in enumerate(made))


@pytest.mark.parametrize(
    ("calls", "transfers"),
    [
        ([("permute", CUT, {"shift": 1}), ("permute", CUT, {"shift": -1})], 2),
        (
            [
                ("all_gather_replicated", WHOLE, {}),
                ("all_gather", WHOLE.add_varying(("dp",)), {}),
            ],
            1,
        ),
    ],
)
def test_collectives_share_a_transfer_where_they_move_the_same(
    calls: list[tuple[str, Layout, dict[str, Arg]]], transfers: int
) -> None:
    graph = two_of(*calls)
    assert len(lowered(graph).exchanges) == transfers
    assert len({transfer_key(node) for node in graph.nodes if moves(node)}) == transfers


@pytest.mark.parametrize(
    ("also", "donated"), [("", True), ("used", False), ("returned", False), ("view", False)]
)
def test_a_sum_is_donated_where_nothing_else_reads_its_memory(also: str, donated: bool) -> None:
    builder, aten = Builder("step.forward", MESH), torch.ops.aten
    kind, whole = TensorType((8, 8), torch.float32), replicated((8, 8))

    def emit(op: Op, args: tuple[Arg, ...], layout: Layout, axes: tuple[str, ...] = ()) -> Node:
        kwargs = {"axes": axes} if axes else {}
        return builder.emit(op, args, kwargs, type=kind, layout=layout, origin=Origin())

    x = emit(INPUT, ("argument", "x"), split((8, 8), {1: ("dp",)}))
    y = emit(INPUT, ("argument", "y"), split((8, 8), {0: ("dp",)}))
    pending = whole.add_partial(["dp"])
    product = emit(aten.mm.default, (x, y), pending)
    if also == "view":
        product = emit(aten.t.default, (product,), pending)
    made = [emit(MeshOp("all_reduce"), (product,), whole, ("dp",))]
    if also == "used":
        made.append(emit(aten.neg.default, (product,), pending))
    if also == "returned":
        made.append(product)
    graph = builder.graph(Output(OutputKind.OUTPUT, str(i), n) for i, n in enumerate(made))
    (exchange,) = lowered(graph).exchanges
    assert exchange.donate == donated
