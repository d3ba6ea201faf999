"""Multiply by all weights of one input at once.

Before:  summa: f32[8, 8, 24]     = mesh::summa(x, q_weight, True, [row], col)
         summa_1: f32[8, 8, 24]   = mesh::summa(x, k_weight, True, [row], col)
After:   summa: (f32[8, 8, 24], f32[8, 8, 24])
                                  = mesh::summa(x, q_weight, k_weight, True, [row], col)
         getitem: f32[8, 8, 24]   = summa[0]
         getitem_1: f32[8, 8, 24] = summa[1]

Products in blocks of one module that multiply the same value, such as queries, keys and values, or
a gate and what it gates, send it once between them, forward and backward, and their cotangents of
it are one sum. Weights stay as they are stored. Products stay apart that a `checkpoint` or a
`stages` tells apart, or what enters one of them has a layout of its own.
Requires: stages and regions are known. Ensures: the same values.
Elsewhere: the fused projections of Megatron-LM and Optimus, which are one weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from meshwright.compiler.composites.block_products import BlockProduct
from meshwright.compiler.graph.ir import GETITEM, Builder, Node, Origin, map_nodes
from meshwright.compiler.placing.composite import composite_of
from meshwright.passes.rewriting.rewriter import emit_for
from meshwright.passes.statements.checkpoint import Regions, keep_names
from meshwright.passes.statements.draft import Draft, with_graph


def siblings(draft: Draft) -> Draft:
    """`draft` with products in blocks that multiply one value put together."""
    groups = _groups(draft)
    return _Merger(draft, groups).run() if groups else draft


def _groups(draft: Draft) -> dict[Node, list[Node]]:
    """By product: those that multiply what it does, in order."""
    found: dict[Hashable, list[Node]] = {}
    regions = Regions(draft.checkpoints, draft.graph)
    for node in draft.graph.nodes:
        if isinstance(composite_of(node.op), BlockProduct) and node not in draft.entering:
            x, _, is_transposed, *axes = node.args
            options = node.op, is_transposed, *map(str, axes)
            key = x, options, node.stage, _around(node.origin), _kept(node, regions)
            found.setdefault(key, []).append(node)
    return {node: group for group in found.values() if len(group) > 1 for node in group}


def _around(origin: Origin) -> Hashable:
    """The call of the module around the one that a product is in."""
    return origin.modules[:-1], origin.calls[:-1]


def _kept(node: Node, regions: Regions) -> Hashable:
    """What a `checkpoint` says of a product: its regions, and itself if it is kept by its name."""
    around = regions.around.get(node, ())
    words = around[-1].statement.keep if around else ()
    named = any("." in word and keep_names(word, node) for word in words)
    return around, node if named else None


class _Merger:
    def __init__(self, draft: Draft, groups: Mapping[Node, list[Node]]) -> None:
        self.draft, self.groups = draft, groups
        self.builder = Builder(draft.graph.name, draft.graph.mesh)
        self.mapping: dict[Node, Node] = {}

    def run(self) -> Draft:
        graph = self.draft.graph
        for node in graph.nodes:
            if node not in self.mapping:
                self._emit(node)
        outputs = (each.of(self.mapping[each.node]) for each in graph.outputs)
        return with_graph(self.draft, self.builder.graph(outputs), self.mapping, self.mapping)

    def _emit(self, node: Node) -> None:
        """Emit a node and, before it, whatever it needs."""
        group = self.groups.get(node, [node])
        for operand in (operand for each in group for operand in each.operands()):
            if operand not in self.mapping:
                self._emit(operand)
        if len(group) == 1:
            self.mapping[node] = self.builder.copy(node, self.mapping)
            return
        x, _, *options = map_nodes(node.args, self.mapping.__getitem__)
        weights = [self.mapping[each.args[1]] for each in group]
        source = max(group, key=lambda each: each.requires_grad)
        together = emit_for(
            *(source, self.builder, node.op, (x, *weights, *options)),
            origin=_together(group),
        )
        for i, each in enumerate(group):
            self.mapping[each] = emit_for(
                *(each, self.builder, GETITEM, (together, i)), type=each.type
            )


def _together(group: list[Node]) -> Origin:
    """The origin of what a module does for some of those in it."""
    first, *others = (each.origin for each in group)
    if all(each.modules == first.modules for each in others):
        return first
    path, kind = first.modules[-2] if len(first.modules) > 1 else ("", "")
    return replace(
        first, module=path, module_type=kind, modules=first.modules[:-1], calls=first.calls[:-1]
    )
