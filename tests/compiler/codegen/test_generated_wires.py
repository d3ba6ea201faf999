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
    Origin,
    Output,
    OutputKind,
    TensorType,
)
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.report.ledger import ledger
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
    assert len(ledger([graph])) == transfers
