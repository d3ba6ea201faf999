"""Sum up what two copies of each stage compute, of which each runs some of the microbatches.

Before:  all_reduce: f32[64, 16] = all_reduce(mm, micro)
         bucket: f32[1024]       = bucket(all_reduce)
After:   all_reduce: f32[64, 16] = all_reduce(mm, micro)
         transfer: f32[64, 16]   = transfer(all_reduce, to stage 0)
         add: f32[64, 16]        = add(all_reduce, transfer)
         bucket: f32[1024]       = bucket(add)

DualPipe, and tables of users, have every stage on two ranks. What leaves the loop over microbatches
is a sum over those of one copy; it goes to the other copy, whose own sum comes back, and both add
the two. So gradients and the loss are those of all microbatches, the same bits on both.
Requires: a joint graph with its phases. Ensures: after the loop, both copies have equal values.
Elsewhere: DeepSeek's DualPipe, which all-reduces gradients between the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from meshwright.compiler.graph.ir import TRANSFER, Builder, Node, Op, Phase, rewrite
from meshwright.compiler.graph.transfers import collective_kind, combines
from meshwright.dsl.statements import Stages
from meshwright.passes.schedule import pipeline_table
from meshwright.passes.statements.draft import Draft

aten = torch.ops.aten

_COMBINED = {"sum": aten.add.Tensor, "max": aten.maximum.default, "min": aten.minimum.default}


def copies(draft: Draft) -> Draft:
    """`draft` with the sums of both copies of each stage, where a schedule has two."""
    table = pipeline_table(draft)
    if table is None or len(table.holders[0]) == 1:
        return draft
    (statement,) = draft.plan.of(Stages)
    if len(statement.over) > 1:
        raise draft.plan.error(
            "P501",
            "the schedule has every stage on two ranks, which takes a pipeline over one axis",
            statement.at("over"),
            help="make them one axis of the mesh: "
            f"`{statement.over[0]}={draft.mesh.size(statement.over)}`",
        )

    def summed(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        if node.phase is not Phase.AFTER or not combines(node, draft.mesh):
            return None
        own = builder.copy(node, mapping, phase=Phase.SUM)

        def after(op: Op, *values: Node) -> Node:
            return builder.emit(
                op, values, type=own.type, layout=own.layout, origin=own.origin, phase=Phase.AFTER
            )

        return after(_operator(node), own, after(TRANSFER, own))

    return replace(draft, graph=rewrite(draft.graph, summed))


def _operator(node: Node) -> torch._ops.OpOverload:
    """What makes one of the values of two copies; of values side by side each has zeros where the
    other has values."""
    kind = collective_kind(node.op)
    assert kind is not None
    if kind.gathers:
        return aten.logical_or.default if node.tensor.dtype == torch.bool else aten.add.Tensor
    return _COMBINED[node.args[0].placed.reduction]
