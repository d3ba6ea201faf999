"""Add the bias of a linear map after its product, where that is a sum over ranks.

Before:  linear: f32[8, 64] = linear(x, up_weight, up_bias)
After:   linear: f32[8, 64] = linear(x, up_weight)
         add: f32[8, 64]    = add(linear, up_bias)

A rule can't let a product be pending to which something is added: it would be added once per rank.
Requires: a graph that is not placed. Ensures: the same values.
"""

from __future__ import annotations

import torch

from meshwright.compiler.graph.ir import Arg, Builder, Node, Op, map_nodes
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.passes.placing.written import written
from meshwright.passes.rewriting.rewriter import emit_for
from meshwright.passes.statements.draft import Draft, with_graph
from meshwright.passes.statements.linears import contracted_dim, is_convolution

aten = torch.ops.aten


def bias_apart(draft: Draft) -> Draft:
    """`draft` with biases apart from products with weights whose contracted dim is split."""
    layouts = written(draft, draft.graph)
    builder = Builder(draft.graph.name, draft.graph.mesh)
    mapping: dict[Node, Node] = {}
    first: dict[Node, Node] = {}
    for node in draft.graph.nodes:
        found = _bias_apart(node)
        if found is None or not _is_split(layouts.get(found[1][1]), found[3]):
            mapping[node] = first[node] = builder.copy(node, mapping)
            continue
        op, args, bias, _ = found
        product = first[node] = emit_for(node, builder, op, map_nodes(args, mapping.__getitem__))
        added = mapping[bias]
        if is_convolution(op):
            shape = [*bias.tensor.shape, *[1] * (len(args[1].tensor.shape) - 2)]
            added = emit_for(node, builder, aten.view.default, (added, shape))
        mapping[node] = emit_for(node, builder, aten.add.Tensor, (product, added))
    graph = builder.graph(each.of(mapping[each.node]) for each in draft.graph.outputs)
    return with_graph(draft, graph, mapping, first)


def _is_split(layout: Layout | None, dim: int) -> bool:
    return layout is not None and bool(dim_axes(layout.dims[dim]))


def _bias_apart(node: Node) -> tuple[Op, tuple[Arg, ...], Node, int] | None:
    """The operator and arguments of a linear map without its bias, the bias, and the dim of the
    weight that is contracted."""
    if node.op == aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        return aten.mm.default, (x, weight), bias, 0
    contracted = contracted_dim(node)
    if contracted is None or len(node.args) < 3:
        return None
    x, weight, bias, *rest = node.args
    if bias is None:
        return None
    return node.op, (x, weight, None, *rest) if rest else (x, weight), bias, contracted
