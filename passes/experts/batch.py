"""Do for every expert what the graph says of one.

Before:  linear_2: f32[2, 4, 8] = linear(one_expert, one_expert_1, one_expert_2)
         relu: f32[2, 4, 8]     = relu(linear_2)
After:   transpose_3: f32[4, 8, 8] = transpose(blocks_0_mlp_experts_up_weight, 1, 2)
         view: f32[4, 8, 8]        = view(transpose_2, [4, 8, 8])
         bmm: f32[4, 8, 8]         = bmm(view, transpose_3)
         view_1: f32[4, 1, 8]      = view(blocks_0_mlp_experts_up_bias, [4, 1, 8])
         add_1: f32[4, 8, 8]       = add(bmm, view_1)
         view_2: f32[4, 2, 4, 8]   = view(add_1, [4, 2, 4, 8])
         relu: f32[4, 2, 4, 8]     = relu(view_2)

Requires: a captured graph. Ensures: what stands between `one_expert` and `all_experts` has a
leading dim of experts; products with a weight are `bmm`, and any other operator is what
`torch.vmap` makes of it. What stands between `one_row` and `all_rows` has a row for each token, or
for each choice of one; see `ragged.py`.
Elsewhere: `torch.vmap` over stacked modules.
"""

from __future__ import annotations

import torch

from meshwright.compiler.graph.experts import ALL_EXPERTS, ALL_ROWS, ONE_EXPERT, ONE_ROW
from meshwright.compiler.graph.ir import GETITEM, Builder, Graph, Node, rewrite
from meshwright.passes.experts.calls import BatchedCall
from meshwright.passes.experts.ragged import EXPERTS, TOKENS, Lead, RaggedCall
from meshwright.passes.rewriting.rewriter import emit_for

aten = torch.ops.aten


def batch(graph: Graph) -> Graph:
    """The graph with every node between `one_expert` and `all_experts` for all experts, and every
    one between `one_row` and `all_rows` for all choices of tokens."""
    if not any(node.op == ONE_EXPERT for node in graph.nodes):
        return graph
    return rewrite(graph, _Batch())


class _Batch:
    """Emits nodes for all experts or rows; `leads` says of each node what its leading dim counts,
    and `items` has the results of those with multiple."""

    def __init__(self) -> None:
        self.leads: dict[Node, Lead] = {}
        self.items: dict[Node, tuple[Node, ...]] = {}

    def __call__(self, builder: Builder, node: Node, mapping: dict[Node, Node]) -> Node | None:
        if node.op in (ONE_EXPERT, ONE_ROW):
            stacked, *expert = (mapping[each] for each in node.args)
            kind = TOKENS if expert else EXPERTS
            self.leads[node] = Lead(kind, stacked.tensor.shape[0], *expert)
            return stacked
        if node.op in (ALL_EXPERTS, ALL_ROWS):
            return self._all(builder, node, mapping)
        leads = {self.leads[each] for each in node.operands() if each in self.leads}
        if not leads:
            return None
        if node.op == GETITEM:
            self.leads[node] = self.leads[node.args[0]]
            return self.items[node.args[0]][node.args[1]]
        if len(leads) == 1:
            (lead,) = leads
            found = BatchedCall(builder, node, mapping, self.leads, lead.size).emitted()
        else:
            lead = next(each.of_choices for each in leads if each.kind != EXPERTS)
            found = RaggedCall(builder, node, mapping, self.leads, lead).emitted()
        self.leads[node], self.items[node] = lead, found
        return found[0]

    def _all(self, builder: Builder, node: Node, mapping: dict[Node, Node]) -> Node:
        """What all experts or choices have of a value."""
        value: Node = node.args[0]
        if value not in self.leads:
            given = (mapping[value], node.tensor.shape)
            return emit_for(node, builder, aten.expand.default, given)
        lead = self.leads[value]
        if lead.kind == TOKENS:
            found = RaggedCall(builder, node, mapping, self.leads, lead.of_choices).lifted(value)
        else:
            found = mapping[value]
        return emit_for(node, builder, aten.view.default, (found, node.tensor.shape))
