"""Store sequences in zigzag order, so that causal attention round a ring is balanced.

Before:  embedding: f32[8, 8, 24]                   = mesh::embedding(wte_weight, tokens, -1)
         attention: (f32[8, 4, 8, 6], f32[8, 4, 8]) = mesh::ring_attention(unbind_0, unbind_1,
             unbind_2, None, True, None, 0.0, 0, [cp], 2, contiguous)
After:   index_select: i64[8, 8]                    = index_select(tokens, 1, view)
         embedding: f32[8, 8, 24]                   = mesh::embedding(wte_weight, index_select, -1)
         attention: (f32[8, 4, 8, 6], f32[8, 4, 8]) = mesh::ring_attention(unbind_0, unbind_1,
             unbind_2, None, True, None, 0.0, 0, [cp], 2, zigzag)

A sequence in 2n parts, of which the rank r of n has the parts r and 2n - 1 - r. No split of the
sequence says so, hence its elements change places, where it begins: in tokens, positions and masks.
Attention knows the order, and operators that treat elements by themselves need not. One that does
not gets the sequence in its own order, as what a model returns. Where anything else needs that, or
an activation would have to be put into the order, the graph stays as it is.
Requires: rings of one length under a statement. Ensures: the same values.
Elsewhere: zigzag ring attention (zhuzilin/ring-flash-attention), Megatron-LM's context parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

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
from meshwright.compiler.placing.rules.notation import Letters, Spec
from meshwright.compiler.placing.rules.views import RESHAPES
from meshwright.passes.rewriting.equivariance import IN_ANY_ORDER, spec_of
from meshwright.passes.rewriting.rewriter import emit_for

aten = torch.ops.aten

Places: TypeAlias = "Mapping[int, int]"
"""The dims of a value that have a sequence in another order, and how many elements are outside of
it in the dim: it may be merged with the batch."""
_NONE: Places = {}
_SPREAD: tuple[Op, ...] = (aten.expand.default, aten.expand_copy.default, aten.broadcast_to.default)
"""Operators whose results have dims along which they are the same."""


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
        self.calls: dict[tuple[Node, tuple[frozenset[tuple[int, int]], ...]], Node] = {}
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
            new = builder.copy(node, news, name=source.name)
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
        if found is None:
            results = len(node.type) if isinstance(node.type, tuple) else 1
            wanted, places = [_NONE] * len(operands), (_NONE,) * results
            if any(given):
                self.culprit = self.culprit or node
        else:
            wanted, places = found
        return self._copied(node, wanted), places

    def _ring(self, node: Node) -> Node:
        wanted: list[Places] = []
        for operand in node.operands():
            shape = operand.tensor.shape
            bias = len(wanted) == 3
            dims = (len(shape) - 2, len(shape) - 1) if bias else (2,)
            wanted.append({dim: 1 for dim in dims if shape[dim] == self.length})
        operands, _ = self._brought(node, wanted)
        ring = Ring.of(node.args, 4)._replace(order="zigzag")
        return self.builder.copy(node, {}, args=(*operands[:4], *ring))

    def _copied(self, node: Node, wanted: Sequence[Places]) -> Node:
        """The node on its operands, each with its sequence in this order; made once."""
        key = node, tuple(frozenset(places.items()) for places in wanted)
        if key not in self.calls:
            args, kwargs = self._brought(node, wanted)
            self.calls[key] = self.builder.copy(node, {}, args=args, kwargs=kwargs)
        return self.calls[key]

    def _brought(
        self, node: Node, wanted: Sequence[Places]
    ) -> tuple[tuple[Arg, ...], dict[str, Arg]]:
        """The arguments of a node, with its operands in this order."""
        operands = call_operands(node.args, node.kwargs)
        given = iter([self._ordered(*pair) for pair in zip(operands, wanted, strict=True)])
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
            self.culprit = self.culprit or node
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
            return emit_for(node, self.builder, op, args, kwargs)

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

    def _through(
        self, node: Node, given: Sequence[Places] | None, results: Mapping[int, Places]
    ) -> tuple[list[Places], tuple[Places, ...]] | None:
        """The order of all operands and results, from that which operands or results have; None if
        the operator does not treat the elements of these sequences each by itself."""
        if node.op in RESHAPES:
            return self._reshaped(node, given, results)
        known = composite_of(node.op)
        if known is not None and known.number is not None and node.args[known.number]:
            return None  # its random numbers depend on the order
        found = spec_of(node, self.graph.mesh)
        if found is None:
            return None
        spec = found[1]
        operands = given if given is not None else [_NONE] * len(spec.operands)
        terms = [(spec.results[i], places) for i, places in results.items()]
        terms += [
            pair
            for i, pair in enumerate(zip(spec.operands, operands, strict=True))
            if i not in spec.ignored
        ]
        marks = _marks(spec, terms)
        if marks is None or not all(_is_known(node, spec, letter) for letter in marks):
            return None
        wanted = [
            self.own[operand][0] if i in spec.ignored else _places(term, marks)
            for i, (term, operand) in enumerate(
                zip(spec.operands, call_operands(node.args, node.kwargs), strict=True)
            )
        ]
        return wanted, tuple(_places(term or (), marks) for term in spec.results)

    def _reshaped(
        self, node: Node, given: Sequence[Places] | None, results: Mapping[int, Places]
    ) -> tuple[list[Places], tuple[Places, ...]] | None:
        (operand,) = node.operands()
        shapes = operand.tensor.shape, node.tensor.shape
        known = given[0] if given is not None else results[0]
        source, target = shapes if given is not None else shapes[::-1]
        found: dict[int, int] = {}
        for dim, outer in known.items():
            before = math.prod(source[:dim]) * outer
            place = _holding(target, before, self.length)
            if place is None:
                return None
            found[place[0]] = place[1]
        return ([known], (found,)) if given is not None else ([found], (known,))


def _marks(spec: Spec, terms: Iterable[tuple[Letters | None, Places]]) -> dict[str, int] | None:
    """The letters of sequences, each with what is outside of it; None if an operator does not treat
    their elements each by itself."""
    marks: dict[str, int] = {}
    for term, places in terms:
        for dim, outer in places.items():
            letter = term[dim] if term else ""
            if not letter or marks.setdefault(letter, outer) != outer:
                return None
    mixed = spec.whole | spec.inner | spec.derived | spec.consecutive
    return None if mixed & marks.keys() else marks


def _is_known(node: Node, spec: Spec, letter: str) -> bool:
    """Whether the elements along a letter are those of operands, in the same order in each result
    or summed up in any."""
    taken = [term for term in spec.operands if letter in term]
    given = [term for term in spec.results if term is not None]
    if any(term.count(letter) > 1 for term in (*taken, *given)):
        return False
    if not taken and node.op not in _SPREAD:
        return False
    return node.op in IN_ANY_ORDER or all(letter in term for term in given)


def _places(term: Letters, marks: Mapping[str, int]) -> Places:
    return {dim: marks[letter] for dim, letter in enumerate(term) if letter in marks}


def _holding(shape: Sequence[int], before: int, length: int) -> tuple[int, int] | None:
    """The dim that holds a sequence whole, of which an element stands behind `before` others in
    the order of the dims, and how many of these are in that dim."""
    outside = 1
    for dim, size in enumerate(shape):
        inside = outside * size
        if before % outside == 0 and before * length <= inside and inside % (before * length) == 0:
            return dim, before // outside
        outside = inside
    return None
