"""Slice what a call takes instead of what it gives.

Before:  expand: i64[8, 16]        = expand(arange, [8, 16])
         embedding: f32[8, 16, 64] = mesh::embedding(wpe_weight, expand, -1)
         slice: f32[8@dp, 16, 64]  = slice(embedding, dp)
After:   expand: i64[8@dp, 16]         = expand(arange, [8, 16])
         vary: f32[16, 64] varying(dp) = vary(wpe_weight, dp)
         embedding: f32[8@dp, 16, 64]  = mesh::embedding(vary, expand, -1)

Layouts flow forward, so what is made of parameters and constants alone (positions, masks) is
whole until it meets something split. Sliced there, its cotangent would be gathered, and every rank
would compute all of it; sliced at its source it is one more partial gradient of a parameter. A
slice moves up as long as that sends no more bytes, through values of which nothing else is needed.
Requires: a placed graph, not yet differentiated. Ensures: the same values, placed by their rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    TRANSFER,
    Builder,
    MeshOp,
    Node,
    NodeLayout,
    Origin,
    TensorType,
    rewrite,
)
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.graph.transfers import is_collective
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import collectives, cost
from meshwright.compiler.placing.calls import make_call
from meshwright.compiler.placing.emit import Emitter
from meshwright.compiler.placing.engine import candidates
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement
from meshwright.passes.statements.draft import Draft

SLICE, VARY, ALL_REDUCE = MeshOp("slice"), MeshOp("vary"), MeshOp("all_reduce")
_FREE = {SLICE.name, VARY.name}
"""The changes of layout that a hoisted call may ask of its operands."""


def hoist(draft: Draft) -> Draft:
    """`draft` with the slices of its graph as early as that sends no more bytes."""
    return _Hoister(draft).run()


class _Hoister:
    def __init__(self, draft: Draft) -> None:
        self.draft, self.graph, self.mesh = draft, draft.graph, draft.mesh
        self.users = self.graph.users()
        self.returned = self.graph.returned
        self.placements: dict[Node, Placement] = {}
        """How each call could run to give no more than the slice that its users want."""
        self.wanted: dict[Node, Layout] = {}

    def run(self) -> Draft:
        for node in reversed(self.graph.nodes):
            self._consider(node)
        chosen = self._chosen()
        return self._emitted(chosen) if chosen else self.draft

    def _consider(self, node: Node) -> None:
        """Note how a call could give just the slice that its users want, if all want the same."""
        frame = node.op in (INPUT, TRANSFER) or (is_collective(node) and node.op != VARY)
        given = self._given(node)
        if frame or node in self.returned or given is None:
            return
        asked = {self._asked(user, node) for user in self.users[node]}
        (layout,) = asked if len(asked) == 1 else (None,)
        if layout is None or layout == given.placed:
            return
        placement: Placement | None
        if node.op == VARY:
            before = layout.drop_varying(node.kwargs["axes"])
            placement = Placement((before,), (layout,))
        elif node.op == GETITEM:
            alone = self._given(node.args[0]) is node
            placement = Placement((layout,), (layout,)) if alone else None
        else:
            place = 0 if given is node else given.args[1]
            first = (layout,) if place == 0 else ()
            placement = _narrowed(_call(node, self.mesh, first), layout, place)
        if placement is not None:
            self.placements[node], self.wanted[node] = placement, layout

    def _given(self, node: Node) -> Node | None:
        """The one tensor that a call gives; of multiple results, the only one in use."""
        if isinstance(node.type, TensorType):
            return node
        users = self.users[node]
        return users[0] if len(users) == 1 and users[0].op == GETITEM else None

    def _asked(self, user: Node, value: Node) -> Layout | None:
        """The slice of `value` that a user wants; None if it wants all of it or multiple slices."""
        if user.op == SLICE:
            return user.placed
        if user not in self.placements:
            return None
        operands = call_operands(user.args, user.kwargs)
        layouts = self.placements[user].operands
        asked = {layout for n, layout in zip(operands, layouts, strict=True) if n is value}
        if len(asked) > 1:
            return None
        (layout,) = asked
        return self._slice_of(value, layout)

    def _slice_of(self, value: Node, layout: Layout) -> Layout:
        """A layout of `value` without the varying axes that it does not have itself."""
        layout, given = layout.canonical(self.mesh), self._given(value)
        assert given is not None
        return layout.drop_varying(set(layout.varying) - set(given.placed.varying))

    def _chosen(self) -> set[Node]:
        """The calls to run on slices: where that costs no more, and no user needs the rest."""
        price: dict[Node, float] = {}
        for node in self.graph.nodes:
            if node in self.placements:
                price[node] = self._price(node, price)
        chosen: set[Node] = set()
        for node in reversed(self.graph.nodes):
            worthwhile = node in price and price[node] <= self._sliced(node, self.wanted[node])
            if worthwhile and all(u.op == SLICE or u in chosen for u in self.users[node]):
                chosen.add(node)
        return chosen

    def _price(self, node: Node, price: Mapping[Node, float]) -> float:
        """The bytes that the operands of a narrowed call cost, each the cheaper of two ways."""
        if node.op == GETITEM:
            return price.get(node.args[0], math.inf)
        total = 0.0
        operands = call_operands(node.args, node.kwargs)
        for operand, layout in zip(operands, self.placements[node].operands, strict=True):
            here = self._sliced(operand, layout)
            total += min(here, price.get(operand, here))
        return total

    def _sliced(self, value: Node, layout: Layout) -> float:
        """The bytes sent to slice a value, its adjoint included."""
        given = self._given(value)
        assert given is not None
        layout, size = self._slice_of(value, layout), given.tensor.dtype.itemsize
        return cost(given.placed, layout, size, self.mesh, given.requires_grad)

    def _emitted(self, chosen: set[Node]) -> Draft:
        emitter = Emitter(Builder(self.graph.name, self.mesh))
        planned, lines = self._planned(chosen), self._lines(chosen)

        def hoisted(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
            if node.op == SLICE and node.args[0] in chosen:
                return mapping[node.args[0]]
            if node not in chosen:
                return None
            origin = replace(node.origin, plan_line=lines[node])
            sources = {n: self._unreduced(n, chosen) for n in node.operands()}
            brought = {n: mapping[source] for n, source in sources.items()}
            return self._narrow(node, emitter, brought, origin, planned[node])

        graph = rewrite(self.graph, hoisted, builder=emitter.builder)
        kept = (m for m in self.draft.movements if m.node.op != SLICE or m.value not in chosen)
        return replace(self.draft, graph=graph, movements=(*kept, *emitter.movements))

    def _planned(self, chosen: set[Node]) -> dict[Node, frozenset[str]]:
        """By chosen call: the axes over which the plan asked for a slice that it takes over."""
        axes = {m.node: frozenset(m.collective.axes) for m in self.draft.movements if m.forced}
        found: dict[Node, frozenset[str]] = {}
        for node in reversed(self.graph.nodes):
            if node in chosen:
                users = self.users[node]
                found[node] = frozenset().union(*(found.get(u, axes.get(u, ())) for u in users))
        return found

    def _lines(self, chosen: set[Node]) -> dict[Node, str]:
        """By chosen call: the line of the plan behind the slice that it takes over."""
        found: dict[Node, str] = {}
        for node in reversed(self.graph.nodes):
            if node in chosen:
                lines = (found.get(u, u.origin.plan_line) for u in self.users[node])
                found[node] = next(filter(None, lines), "")
        return found

    def _unreduced(self, value: Node, chosen: set[Node]) -> Node:
        """What to slice for `value`: its pending sum, if nothing needs all of it reduced."""
        reduced = value.op == ALL_REDUCE and value not in self.returned
        return value.args[0] if reduced and set(self.users[value]) <= chosen else value

    def _narrow(
        self,
        node: Node,
        emitter: Emitter,
        values: Mapping[Node, Node],
        origin: Origin,
        planned: frozenset[str],
    ) -> Node:
        if node.op == GETITEM:
            source, index = node.args
            return emitter.item(values[source], index, origin, name=node.name)
        operands = call_operands(node.args, node.kwargs)
        brought = {
            operand: emitter.reshard(values[operand], layout, origin, user=node.op, forced=planned)
            for operand, layout in zip(operands, self.placements[node].operands, strict=True)
        }
        return emitter.builder.copy(node, brought, layout=self._layouts(node))

    def _layouts(self, node: Node) -> NodeLayout:
        """The layouts of a chosen call's results."""
        if isinstance(node.type, TensorType):
            return self.wanted[node]
        results = self.placements[node].results
        return tuple(None if each is None else each.canonical(self.mesh) for each in results)


def _call(node: Node, mesh: Mesh, wanted: tuple[Layout, ...]) -> Call:
    def operand(value: Node) -> Operand:
        return Operand(value.tensor, value.placed, differentiable=value.requires_grad)

    return make_call(node.op, node.args, node.kwargs, node.type, mesh, operand, wanted)


@lru_cache(maxsize=4096)
def _narrowed(call: Call, wanted: Layout, place: int) -> Placement | None:
    """The cheapest placement that gives `wanted`, as the result at `place`, on slices of the
    operands, if there is any."""
    best: tuple[float, Placement] | None = None
    for placement in candidates(call):
        result = placement.results[place]
        if result is None or result.canonical(call.mesh) != wanted:
            continue
        price = 0.0
        for operand, layout in zip(call.operands, placement.operands, strict=True):
            taken = collectives(operand.layout, layout, call.mesh)
            if any(collective.kind not in _FREE for collective in taken):
                break
            size = operand.type.dtype.itemsize
            moved = [collective for collective in taken if collective.kind == SLICE.name]
            price += sum(
                cost(s.source, s.target, size, call.mesh, operand.differentiable) for s in moved
            )
        else:
            if best is None or price < best[0]:
                best = price, placement
    return best[1] if best else None
