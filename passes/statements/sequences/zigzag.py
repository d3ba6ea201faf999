"""Store sequences in zigzag order, so that causal attention round a ring is balanced.

Before:  embedding: f32[8, 8, 24]                   = mesh::embedding(wte_weight, tokens, -1)
         attention: (f32[8, 4, 8, 6], f32[8, 4, 8]) = mesh::ring_attention(unbind_0, unbind_1,
             unbind_2, None, True, None, 0.0, 0, [cp], 2, contiguous, None)
After:   index_select: i64[8, 8]                    = index_select(tokens, 1, zigzag_8)
         embedding: f32[8, 8, 24]                   = mesh::embedding(wte_weight, index_select, -1)
         attention: (f32[8, 4, 8, 6], f32[8, 4, 8]) = mesh::ring_attention(unbind_0, unbind_1,
             unbind_2, None, True, None, 0.0, 0, [cp], 2, zigzag, None)

A sequence in 2n parts, of which the rank r of n has the parts r and 2n - 1 - r. No split of the
sequence says so, hence its elements change places, where it begins: in tokens, positions and masks.
Attention knows the order, and operators that treat elements by themselves need not. One that does
not gets the sequence in its own order, as what a model returns. Where anything else needs that, or
an activation would have to be put into the order, the graph stays as it is.
Requires: rings of one length under a statement. Ensures: the same values.
Elsewhere: zigzag ring attention (zhuzilin/ring-flash-attention), Megatron-LM's context parallelism.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from meshwright.compiler.composites.ring_attention import Ring
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Arg,
    Builder,
    Graph,
    Node,
    Op,
    map_nodes,
    rewrite,
)
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.placing.rules.factories import filled_with
from meshwright.passes.rewriting.rewriter import emit_for
from meshwright.passes.statements.sequences.orders import Found, Places, through

aten = torch.ops.aten

_NONE: Places = {}


@dataclass(frozen=True)
class Reordered:
    """A graph with sequences in zigzag order: what stands for each node there, if anything does,
    and the first operator, if any, that forbids it."""

    graph: Graph
    mapping: Mapping[Node, Node]
    culprit: Node | None


def zigzag(graph: Graph, rings: Collection[Node], length: int, ranks: int) -> Reordered:
    """`graph` with the sequences of `length` that go round these `rings` in zigzag order."""
    return _Zigzag(graph, rings, length, ranks).run()


class _Zigzag:
    def __init__(self, graph: Graph, rings: Collection[Node], length: int, ranks: int) -> None:
        self.graph, self.rings, self.length, self.ranks = graph, rings, length, ranks
        self.builder = Builder(graph.name, graph.mesh)
        self.built: dict[Node, Node] = {}
        """What stands for each node, with its sequence in the order in which it is computed."""
        self.own: dict[Node, tuple[Places, ...]] = {}
        """That order, of each result."""
        self.others: dict[tuple[Node, frozenset[tuple[int, int]]], Node] = {}
        self.calls: dict[tuple[Node, tuple[frozenset[tuple[int, int]] | None, ...]], Node] = {}
        self.constants: dict[bool, Node] = {}
        self.fed: set[Node] = set()
        """What depends on the inputs of a step."""
        self.culprit: Node | None = None

    def run(self) -> Reordered:
        for node in self.graph.nodes:
            if not self.fed.isdisjoint(node.operands()) or (node.op == INPUT and not node.of_model):
                self.fed.add(node)
            self.built[node], self.own[node] = self._built(node)
        culprit = self.culprit
        outputs = [each.of(self._ordered(each.node, _NONE)) for each in self.graph.outputs]
        return self._named(self.builder.graph(outputs), culprit)

    def _named(self, graph: Graph, culprit: Node | None) -> Reordered:
        """The graph in which nodes have their names again, of which some had two."""
        sources = {new: node for node, new in self.built.items()}
        sources |= {new: node for (node, _), new in (*self.others.items(), *self.calls.items())}
        mapping: dict[Node, Node] = {}

        def named(builder: Builder, node: Node, news: Mapping[Node, Node]) -> Node:
            source = sources.get(node, node)
            same = source.op == node.op
            new = builder.copy(node, news, name=source.name if same else "")
            mapping.setdefault(source, new)
            return new

        return Reordered(rewrite(graph, named), mapping, culprit)

    def _built(self, node: Node) -> tuple[Node, tuple[Places, ...]]:
        """The node on operands in the order that suits it, and the order of its results."""
        if node in self.rings:
            return self._ring(node), ({2: 1}, {2: 1})
        if node.op == GETITEM:
            return self.builder.copy(node, self.built), (self.own[node.args[0]][node.args[1]],)
        operands = call_operands(node.args, node.kwargs)
        given = [self.own[each][0] for each in operands]
        found = self._through(node, given, {}) if any(given) else None
        if found is not None:
            return self._copied(node, found[0]), found[1]
        if any(given):
            self.culprit = self.culprit or node
        results = len(node.type) if isinstance(node.type, tuple) else 1
        return self._copied(node, [_NONE] * len(operands)), (_NONE,) * results

    def _through(
        self, node: Node, given: Sequence[Places] | None, results: Mapping[int, Places]
    ) -> Found | None:
        return through(node, given, results, self.length, self.graph.mesh, drawing=True)

    def _ring(self, node: Node) -> Node:
        wanted: list[Places | None] = []
        for operand in node.operands():
            shape = operand.tensor.shape
            bias = len(wanted) == 3
            dims = (len(shape) - 2, len(shape) - 1) if bias else (2,)
            wanted.append({dim: 1 for dim in dims if shape[dim] == self.length})
        operands, _ = self._brought(node, wanted)
        ring = Ring.of(node.args, 4)._replace(order="zigzag", blocks=self.ranks, reach=None)
        return self.builder.copy(node, {}, args=(*operands[:4], *ring))

    def _copied(self, node: Node, wanted: Sequence[Places | None]) -> Node:
        """The node on its operands, each with its sequence in this order; made once."""
        key = node, tuple(each if each is None else frozenset(each.items()) for each in wanted)
        if key not in self.calls:
            args, kwargs = self._brought(node, wanted)
            known = composite_of(node.op)
            if known is not None and wanted and wanted[0]:
                args = known.in_zigzag(args, wanted[0], self.length, self.ranks)
            self.calls[key] = self.builder.copy(node, {}, args=args, kwargs=kwargs)
        return self.calls[key]

    def _brought(
        self, node: Node, wanted: Sequence[Places | None]
    ) -> tuple[tuple[Arg, ...], dict[str, Arg]]:
        """The arguments of a node, with its operands in this order."""
        operands = call_operands(node.args, node.kwargs)
        pairs = zip(operands, wanted, strict=True)
        given = iter(
            [self.built[x] if places is None else self._ordered(x, places) for x, places in pairs]
        )
        args = map_nodes(node.args, lambda _: next(given))
        names = sorted(node.kwargs)
        return args, {name: map_nodes(node.kwargs[name], lambda _: next(given)) for name in names}

    def _ordered(self, node: Node, places: Places) -> Node:
        """A tensor with its sequence in zigzag order in these places, and in none other."""
        (own,) = self.own[node]
        if places == own:
            return self.built[node]
        key = node, frozenset(places.items())
        if key not in self.others:
            self.others[key] = self._again(node, own, places)
        return self.others[key]

    def _again(self, node: Node, own: Places, places: Places) -> Node:
        """A tensor in another order than that in which it is computed."""
        item = node.op == GETITEM
        call, index = node.args if item else (node, 0)
        found = None if own or node.op == INPUT else self._through(call, None, {index: places})
        if found is not None:
            new = self._copied(call, found[0])
            return self.builder.copy(node, {}, args=(new, index)) if item else new
        if filled_with(node.op, node.args) is not None:
            return self.built[node]
        if node.requires_grad and node in self.fed:
            self.culprit = self.culprit or call
        new = self.built[node]
        for dim, outer in own.items():
            if places.get(dim) != outer:
                new = self._selected(node, new, dim, outer, back=True)
        for dim, outer in places.items():
            if own.get(dim) != outer:
                new = self._selected(node, new, dim, outer, back=False)
        return new

    def _selected(self, node: Node, x: Node, dim: int, outer: int, *, back: bool) -> Node:
        """`x` with a sequence put into zigzag order, or back."""
        shape = x.tensor.shape
        inner = shape[dim] // (outer * self.length)
        apart = (*shape[:dim], outer, self.length, inner, *shape[dim + 1 :])
        if (outer, inner) == (1, 1):
            args = (x, dim, self._order(node, back))
            return emit_for(node, self.builder, aten.index_select.default, args)
        x = emit_for(node, self.builder, aten.view.default, (x, apart))
        args = (x, dim + 1, self._order(node, back))
        x = emit_for(node, self.builder, aten.index_select.default, args)
        return emit_for(node, self.builder, aten.view.default, (x, shape))

    def _order(self, node: Node, back: bool) -> Node:
        """The position of each stored element or, to go back, where each position is stored."""
        if back not in self.constants:
            self.constants[back] = self._parts(node, back)
        return self.constants[back]

    def _parts(self, node: Node, back: bool) -> Node:
        def call(op: Op, *args: Arg) -> Node:
            kwargs = {"dtype": torch.int64} if op == aten.arange.default else {}
            return emit_for(node, self.builder, op, args, kwargs, name="zigzag")

        ranks, half = self.ranks, self.length // (2 * self.ranks)
        count = call(aten.arange.default, ranks)
        if back:  # the parts r and 2n - 1 - r are stored in the places 2r and 2r + 1
            early = call(aten.mul.Tensor, count, 2)
            late = call(aten.add.Tensor, call(aten.mul.Tensor, count, -2), 2 * ranks - 1)
            parts = call(aten.cat.default, (early, late))
        else:
            late = call(aten.add.Tensor, call(aten.mul.Tensor, count, -1), 2 * ranks - 1)
            parts = call(aten.stack.default, (count, late), 1)
        starts = call(aten.mul.Tensor, call(aten.view.default, parts, (2 * ranks, 1)), half)
        return call(
            aten.view.default,
            call(aten.add.Tensor, starts, call(aten.arange.default, half)),
            (self.length,),
        )
