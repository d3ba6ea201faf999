"""Attention over sequences that are split: where they are, and in which layouts attention runs.

Ulysses: queries, keys and values are split by head for attention, and its result by token again.

Before:  attention: (f32[8, 4, 8, 6], f32[8, 4, 8]) = mesh::attention(unbind_0, unbind_1, unbind_2,
             None, True, None, 0.0, 0)
         getitem_1: f32[8, 4, 8, 6]                 = attention[0]
After:   all_to_all: f32[8, 4@cp, 8, 6]                   = all_to_all(unbind_0, cp)
         attention: (f32[8, 4@cp, 8, 6], f32[8, 4@cp, 8]) = mesh::attention(all_to_all,
             all_to_all_1, all_to_all_2, None, True, None, 0.0, 0)
         getitem_1: f32[8, 4@cp, 8, 6]                    = attention[0]
         all_to_all_3: f32[8, 4, 8@cp, 6]                 = all_to_all(getitem_1, cp)

Requires and ensures: what `context.py` and the partitioner ask of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from meshwright.compiler.composites.attention import Attention
from meshwright.compiler.composites.ring_attention import RingAttention
from meshwright.compiler.graph.ir import Graph, Node
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.dsl.errors import PlanError
from meshwright.dsl.statements import Context
from meshwright.passes.statements.draft import Attending, Draft
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.sequences.regions import cut_inside, depth, entered_activations

ATTENTION = (Attention.op, RingAttention.op)
HEADS, TOKENS = 1, 2
"""The dims of what attention takes and gives."""


class Contexts:
    """The split sequences of a graph: `entries` maps a module's first node to the values that
    enter with it, each beside the statement that splits it along dim 1."""

    def __init__(self, graph: Graph, attending: tuple[Attending, ...], mesh: Mesh) -> None:
        self.mesh = mesh
        self.attending = tuple(a for a in attending if mesh.size(a.statement.over) > 1)
        self.entries: dict[Node, list[tuple[Node, Context]]] = {}
        for each in self.attending:
            for node, value in _entered(graph, each.modules):
                self.entries.setdefault(node, []).append((value, each.statement))

    def around(self, node: Node) -> Context | None:
        """The statement of attention that is not in a ring yet; None where there is none."""
        return self.statement_of(node) if node.op == Attention.op else None

    def statement_of(self, node: Node) -> Context | None:
        """The statement of the innermost module around attention; None where there is none."""
        if node.op not in ATTENTION or not self.attending:
            return None
        innermost = max(self.attending, key=partial(depth, node))
        return innermost.statement if depth(node, innermost) >= 0 else None

    def split(self, layout: Layout, dim: int, axes: tuple[str, ...]) -> Layout | None:
        """`layout` with `dim` split over `axes`, inside of what splits it already, and no other
        dim; None where that is not possible."""
        if set(axes) <= set(dim_axes(layout.dims[dim])):
            return layout
        layout = layout.drop_partial(axes).drop_varying(axes).drop_split(axes, self.mesh)
        return cut_inside(layout, dim, axes, self.mesh)


def repeats(groups: int, ranks: int) -> int:
    """How often each head of keys and values is repeated so that `ranks` divide them; a number of
    queries' heads that both divide is a multiple of theirs again."""
    return ranks // math.gcd(groups, ranks)


def uneven_heads(draft: Draft, node: Node, q: Layout, statement: Context) -> PlanError:
    """The error for heads that the ranks do not divide; `q` is the layout of the queries."""
    heads, axes = q.shape[HEADS], (*dim_axes(q.dims[HEADS]), *statement.over)
    over = ", ".join(f"{axis}={draft.mesh.size(axis)}" for axis in dict.fromkeys(axes))
    before = draft.mesh.size([axis for axis in axes if axis not in statement.over])
    fits = [n for n in range(2, heads + 1) if heads % (before * n) == 0]
    fewer = f", or split the sequence over {' or '.join(map(str, fits))} ranks" if fits else ""
    return draft.plan.error(
        "P203",
        f"cannot split {heads} heads over {over}",
        [statement.at("method") or statement.at("over")],
        subject=f"{node.origin.module}: attention of {heads} heads",
        help=f"write `method=ring`, which splits no heads{fewer}",
    )


def check_heads(draft: Draft, node: Node, q: Layout, statement: Context) -> None:
    """Raises `PlanError` where an axis of a ring splits the heads; `q` is as in `uneven_heads`."""
    both = [axis for axis in dim_axes(q.dims[HEADS]) if axis in statement.over]
    if both:
        raise draft.plan.error(
            "P501",
            f"`{both[0]}` splits heads, and tokens in the same attention",
            [statement.at("over")],
            subject=f"queries of {module_text(node.origin.module)}: {q}",
            help="split the linears before it over another axis, or write `method=ulysses`",
        )


def _entered(graph: Graph, modules: frozenset[str]) -> Iterator[tuple[Node, Node]]:
    """The first node inside each module that takes an activation from outside, and this one; where
    none enters a module, those of the modules inside that are around attention."""
    found = entered_activations(graph, modules)
    others = modules - set(found)
    inner = {
        path
        for node in graph.nodes
        if node.op in ATTENTION and others.intersection(p for p, _ in node.origin.modules)
        for path, _ in node.origin.modules
    }
    yield from found.values()
    yield from entered_activations(graph, frozenset(inner - modules)).values()
