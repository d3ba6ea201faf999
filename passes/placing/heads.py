"""Repeat keys and values of attention where there are fewer heads of them than ranks.

Before:  attention: (f32[8, 4, 16, 8], f32[8, 4, 16]) = mesh::attention(q, keys, values, None, ...)
After:   moved: f32[8, 1, 16, 8]  = mesh::moved(keys, 2)
         unsqueeze                = unsqueeze(moved, 2)
         expand                   = expand(unsqueeze, [8, 1, 4, 16, 8])
         view: f32[8, 4, 16, 8]   = view(expand, [8, 4, 16, 8])
         attention: (f32[8, 4, 16, 8], f32[8, 4, 16]) = mesh::attention(q, view, view_1, None, ...)

Each rank repeats all heads and takes its own. Those that ranks have alike vary over the axes that
split the queries' heads from there on, so that cotangents are summed over them as they were before
repetition. Requires: a marked graph. Ensures: the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from meshwright.compiler.graph.ir import Builder, Node
from meshwright.compiler.layout.layout import Layout
from meshwright.passes.placing.moves import MOVED, Marked, Move, NewLayout, emit_mark, with_heads
from meshwright.passes.rewriting.rewriter import emit_for

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Repeat:
    """To how many heads keys and values are repeated, and the axes that split the queries'."""

    count: int
    axes: tuple[str, ...]


def repeat_heads(marked: Marked, repeats: Mapping[Node, Repeat]) -> Marked:
    """With keys and values repeated for these nodes of attention."""
    moves = [*marked.moves]

    def repeated(builder: Builder, node: Node, mapping: dict[Node, Node]) -> Node | None:
        if node not in repeats:
            return None
        q, *heads = node.args[:3]
        found = [mapping[q]]
        for x in heads:
            # A mark stays the last: it is of what attention takes.
            source = x.args[0] if x.op == MOVED else x
            own = _repeated(builder, node, mapping[source], repeats[node], moves)
            found.append(emit_mark(builder, own, x.args[1], node) if x.op == MOVED else own)
        return with_heads(builder, node, mapping, found)

    return replace(marked.rewritten(repeated)[0], moves=tuple(moves))


def _repeated(builder: Builder, node: Node, heads: Node, repeat: Repeat, moves: list[Move]) -> Node:
    b, groups, *rest = heads.tensor.shape
    if groups == repeat.count:
        return heads
    if heads.requires_grad:
        moves.append(Move(_varying(repeat.axes)))
        heads = emit_mark(builder, heads, len(moves) - 1, node)
    single = emit_for(node, builder, aten.unsqueeze.default, (heads, 2))
    shape = [b, groups, repeat.count // groups, *rest]
    expanded = emit_for(node, builder, aten.expand.default, (single, shape))
    return emit_for(node, builder, aten.view.default, (expanded, [b, repeat.count, *rest]))


def _varying(axes: tuple[str, ...]) -> NewLayout:
    def vary(given: Layout) -> Layout:
        return given.add_varying([axis for axis in axes if given.state(axis) == "replicated"])

    return vary
