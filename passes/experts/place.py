"""Send rows to the ranks that have the experts of a model, and what these make of them back.

Before:  grouped_mm: f64[8, 1, 16]  = mesh::grouped_mm(view_3, blocks_0_experts_up, topk_1)
         silu: f64[8, 16]           = silu(view_3_1)
         mul: f64[8, 16]            = mul(silu, blocks_0_experts_scale)
         grouped_mm_1: f64[8, 1, 8] = mesh::grouped_mm(view_5, blocks_0_experts_down, topk_1)
After:   owned_groups: i64[1, 2, 8]     = mesh::owned_groups(view_1, 4, 2, 8, [ep])
         to_owners: f64[1, 2, 8, 8]     = mesh::to_owners(view_2, view_1, 4, 2, 8, [ep])
         grouped_mm: f64[1, 2, 8, 16]   = mesh::grouped_mm(to_owners, view_4, owned_groups)
         silu: f64[16, 16]              = silu(view_6)
         mul: f64[16, 16]               = mul(silu, blocks_0_experts_scale)
         grouped_mm_1: f64[1, 2, 8, 8]  = mesh::grouped_mm(view_8, view_9, owned_groups)
         from_owners: f64[1, 8, 1, 8]   = mesh::from_owners(view_11, view_1, 4, 2, [ep])

Each row goes to the rank that has its expert, whatever it is, so routing stays what it is. Between
the products of a row and its experts' matrices, what is done to it alone is done there (`inside`);
what compares rows, and the weights of what a token's experts return, are left to its own rank. A
rank has room for all rows of the ranks that exchange with it, or for `maximum` times its even
share; what stays empty is zeros, which no product reads and nothing returns.
Requires: stacked parameters, pinned by `experts`. Ensures: the same values in the order of tokens.
Elsewhere: the token dispatchers of MegaBlocks and of Megatron's expert layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from meshwright.compiler.composites.grouped import GroupedMM
from meshwright.compiler.composites.owners import FromOwners, OwnedGroups, ToOwners
from meshwright.compiler.graph.ir import GETITEM, Arg, Builder, Node, Op, map_nodes
from meshwright.compiler.placing.rules.views import RESHAPES
from meshwright.dsl.statements import Experts
from meshwright.passes.experts.inside import Inside, Region, Rows, inside, lookup_parts, viewed
from meshwright.passes.experts.parts import in_order, parts_of
from meshwright.passes.rewriting.rewriter import emit_for
from meshwright.passes.statements.draft import Draft, input_key, with_graph

aten = torch.ops.aten


def place_experts(draft: Draft) -> Draft:
    """Put what experts compute where they are."""
    found = inside(draft)
    regions = {rows.region for rows in found.nodes.values()}
    ranks = {region: draft.mesh.size(region.statement.over) for region in regions}
    apart = {node: rows for node, rows in found.nodes.items() if ranks[rows.region] > 1}
    return _Placer(draft, Inside(apart, found.parameters)).run() if apart else draft


def _inner_axes(draft: Draft, parameters: Mapping[Node, Experts]) -> dict[Experts, frozenset[str]]:
    """By statement: the axes that split its experts themselves, such as their features."""
    found: dict[Experts, set[str]] = {}
    for node, statement in parameters.items():
        pin = draft.inputs.get(input_key(node))
        axes = set(pin.layout.split_axes) if pin else set()
        found.setdefault(statement, set()).update(axes - set(statement.over))
    return {statement: frozenset(axes) for statement, axes in found.items()}


class _Placer:
    """Writes the graph anew: `values` has nodes in the order of tokens, `owned` those of rows in
    the order of their owners, with as many dims as before, `[(g q m), 1, ...]`."""

    def __init__(self, draft: Draft, found: Inside) -> None:
        self.draft, self.found = draft, found.nodes
        self.inner = _inner_axes(draft, found.parameters)
        self.builder = Builder(draft.graph.name, draft.graph.mesh)
        self.values: dict[Node, Node] = {}
        self.owned: dict[Node, Node] = {}
        self.sent: dict[tuple[Region, Node, int], Node] = {}
        self.exchanges: dict[Region, _Exchange] = {}

    def run(self) -> Draft:
        first: dict[Node, Node] = {}
        for node in self.draft.graph.nodes:
            place = len(self.builder.nodes)
            if node in self.found:
                self.owned[node] = self._owned(node, self.found[node])
            else:
                operands = {each: self.value(each) for each in node.operands()}
                self.values[node] = self.builder.copy(node, operands)
                first[node] = self.builder.nodes[place]
        graph = self.builder.graph(
            output.of(self.value(output.node)) for output in self.draft.graph.outputs
        )
        return with_graph(self.draft, graph, self.values, first)

    def value(self, node: Node) -> Node:
        """A value in the order of tokens: what experts give comes back, once."""
        if node not in self.values:
            rows = self.found[node]
            exchange = self._exchange(rows.region, node)
            self.values[node] = exchange.back(node, self.owned[node], rows.dims)
        return self.values[node]

    def _exchange(self, region: Region, node: Node) -> _Exchange:
        if region not in self.exchanges:
            # A lookup may come before the view of the numbers that products take.
            group = self.value(viewed(region.group))
            given = (region, node, group, self.inner[region.statement])
            self.exchanges[region] = _Exchange(self.draft, self.builder, *given)
        return self.exchanges[region]

    def _owned(self, node: Node, rows: Rows) -> Node:
        """What stands for a node, of rows in the order of owners."""
        exchange = self._exchange(rows.region, node)
        if node.op == GETITEM:
            parent = self.owned[node.args[0]]
            assert isinstance(parent.type, tuple)
            type = parent.type[node.args[1]]
            return emit_for(node, self.builder, GETITEM, (parent, node.args[1]), type=type)
        if node.op == GroupedMM.op:
            x, weight, _ = node.args
            taken = exchange.blocks(node, self.owned[x]) if x in self.owned else self._taken(node)
            return exchange.product(node, taken, self.value(weight))
        if node.op in RESHAPES:
            (operand,) = node.operands()
            return exchange.rows(node, self.owned[operand], rows.dims)
        if rows.added and not any(each in self.owned for each in node.operands()):
            return exchange.lookup(node, self.value(lookup_parts(node)[0]), rows.dims)
        return self._alike(node)

    def _taken(self, node: Node) -> Node:
        """What a product multiplies, sent to owners, once for all that multiply it."""
        region, x = self.found[node].region, node.args[0]
        key = region, viewed(x), len(x.tensor.shape)
        if key not in self.sent:
            exchange = self._exchange(region, node)
            self.sent[key] = exchange.there(node, self.value(x))
        return self.sent[key]

    def _alike(self, node: Node) -> Node:
        def given(operand: Node) -> Node:
            return self.owned[operand] if operand in self.owned else self.value(operand)

        args = map_nodes(node.args, given)
        kwargs = {key: map_nodes(value, given) for key, value in node.kwargs.items()}
        return emit_for(node, self.builder, node.op, args, kwargs)


class _Exchange:
    """The rows of one region: what sends them to their owners and back.

    Rows `r` are cut into slices, `[g, s]`, each of which is exchanged by itself: see `parts`.
    """

    def __init__(
        self,
        draft: Draft,
        builder: Builder,
        region: Region,
        node: Node,
        group: Node,
        inner: frozenset[str],
    ) -> None:
        self.builder, self.region = builder, region
        statement, (num_rows, times) = region.statement, region.shape
        self.axes, self.owners = statement.over, draft.mesh.size(statement.over)
        self.parts = parts_of(draft, node, num_rows, statement.over, inner)
        self.slices = math.prod(part.size for part in self.parts if part.kind == "slices")
        self.maximum = self._room(num_rows // self.slices * times)
        self.group = self._sliced(node, self._view(node, group, region.shape))
        self.shape = (self.slices, self.owners, self.maximum)
        given = (self.group, region.experts, self.owners, self.maximum, self.axes)
        self.numbers = self._emit(node, OwnedGroups.op, *given)

    def _room(self, num_rows: int) -> int:
        """The most rows that one owner takes of so many."""
        factor = self.region.statement.maximum
        if factor is None:
            return num_rows
        return min(num_rows, math.ceil(round(factor * num_rows / self.owners, 6)))

    def there(self, node: Node, x: Node) -> Node:
        """Rows `[r, k]` or `[r, t, k]` of tokens as their owners have them: `[g, q, m, k]`."""
        given = (self.region.experts, self.owners, self.maximum, self.axes)
        return self._emit(node, ToOwners.op, self._sliced(node, x), self.group, *given)

    def back(self, node: Node, y: Node, dims: int) -> Node:
        """Rows of owners in the order of tokens, in the shape that a node has."""
        width = math.prod(node.tensor.shape[dims:])
        blocks = self._view(node, y, (*self.shape, width))
        given = (blocks, self.group, self.region.experts, self.owners, self.axes)
        found = self._emit(node, FromOwners.op, *given)
        order = in_order(self.parts)
        if order != sorted(order):
            sizes = [self.parts[i].size for i in order]
            rest = (*self.region.shape[1:], width)
            found = self._view(node, found, (*sizes, *rest))
            back = [order.index(i) for i in range(len(order))]
            behind = range(len(order), len(order) + len(rest))
            found = self._emit(node, aten.permute.default, found, [*back, *behind])
        return self._view(node, found, node.tensor.shape)

    def product(self, node: Node, x: Node, weight: Node) -> Node:
        """Rows times the matrices of their experts."""
        y = self._emit(node, GroupedMM.op, x, self._stacked(node, weight), self.numbers)
        return self._view(node, y, (math.prod(self.shape), 1, weight.tensor.shape[-1]))

    def lookup(self, node: Node, table: Node, dims: int) -> Node:
        """A row of a table for each number: a product with ones, so that empty rows have none."""
        flat = self._view(
            node, table, (table.tensor.shape[0], 1, math.prod(table.tensor.shape[1:]))
        )
        options = {"dtype": table.tensor.dtype}
        ones = emit_for(node, self.builder, aten.full.default, ([*self.shape, 1], 1), options)
        found = self._emit(node, GroupedMM.op, ones, self._stacked(node, flat), self.numbers)
        return self.rows(node, found, dims)

    def rows(self, node: Node, value: Node, dims: int) -> Node:
        """A value with as many dims as a node has, of which some are of rows."""
        rest = node.tensor.shape[dims:]
        return self._view(node, value, (math.prod(self.shape), *[1] * (dims - 1), *rest))

    def blocks(self, node: Node, value: Node) -> Node:
        """Rows `[(g q m), ..., k]` by owner: `[g, q, m, k]`."""
        return self._view(node, value, (*self.shape, value.tensor.shape[-1]))

    def _stacked(self, node: Node, weight: Node) -> Node:
        count, *rest = weight.tensor.shape
        return self._view(node, weight, (self.owners, count // self.owners, *rest))

    def _sliced(self, node: Node, x: Node) -> Node:
        """`[r, ...]` as `[g, s, ...]`."""
        num_rows, *rest = x.tensor.shape
        order = in_order(self.parts)
        if order != sorted(order):
            x = self._view(node, x, (*(part.size for part in self.parts), *rest))
            behind = range(len(order), len(order) + len(rest))
            x = self._emit(node, aten.permute.default, x, [*order, *behind])
        return self._view(node, x, (self.slices, num_rows // self.slices, *rest))

    def _view(self, node: Node, x: Node, shape: tuple[int, ...]) -> Node:
        return x if x.tensor.shape == shape else self._emit(node, aten.view.default, x, shape)

    def _emit(self, node: Node, op: Op, *args: Arg) -> Node:
        return emit_for(node, self.builder, op, args)
