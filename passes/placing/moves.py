"""Mark where the plan wants a value in another layout: from there on, that is the value.

Before:  add: f32[8, 16, 64] = add(x, dropout)
After:   add: f32[8, 16, 64]   = add(x, dropout)
         moved: f32[8, 16, 64] = mesh::moved(add, 0)

Attention takes keys and values as they were before a model repeats them for its heads. Where it is
split by head while its operands are split along the sequence, these and its result are marked.
Requires: a graph that is not placed. Ensures: the same values; a mark is no operator, and goes when
the graph is placed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from meshwright.compiler.graph.ir import (
    GETITEM,
    Builder,
    Graph,
    MeshOp,
    Node,
    map_nodes,
    rewrite,
)
from meshwright.compiler.layout.layout import Layout
from meshwright.dsl.statements import Context
from meshwright.passes.rewriting.recognise import repeated_heads
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.pins import pin_lines
from meshwright.passes.statements.sequences.attention import ATTENTION, HEADS, TOKENS, Contexts
from meshwright.passes.statements.sequences.regions import Sequences

MOVED = MeshOp("moved")

NewLayout = Callable[[Layout], Layout | None]
"""The layout that the plan wants, for one that a value has; None where it is left as it is."""


@dataclass(frozen=True, slots=True)
class Move:
    """The layout that the plan wants of a value, and the line that says so."""

    wanted: NewLayout
    line: str = ""

    def layout(self, given: Layout) -> Layout:
        """That of a value which has the layout `given`; it varies as before where it can."""
        found = self.wanted(given) or given
        return found.add_varying([a for a in given.varying if found.state(a) == "replicated"])


@dataclass(frozen=True)
class Marked:
    """A graph with marks, which say which of the `moves` they are, and the node of the draft's
    graph behind each of its nodes."""

    draft: Draft
    sequences: Sequences
    contexts: Contexts
    graph: Graph
    moves: tuple[Move, ...]
    old: Mapping[Node, Node]

    def move(self, node: Node) -> Move | None:
        """What a mark says; None for any other node."""
        return self.moves[node.args[1]] if node.op == MOVED else None

    def by_head(self, node: Node) -> Context | None:
        """The statement that splits attention by head, where one does."""
        return by_head(self.contexts, self.old[node])

    def rewritten(
        self, function: Callable[[Builder, Node, dict[Node, Node]], Node | None]
    ) -> tuple[Marked, dict[Node, Node]]:
        """With each node replaced by what the function returns for it, as `rewrite` does; and what
        stands for each node."""
        old: dict[Node, Node] = {}
        found: dict[Node, Node] = {}

        def replaced(builder: Builder, node: Node, mapping: dict[Node, Node]) -> Node:
            count = len(builder.nodes)
            new = found[node] = function(builder, node, mapping) or builder.copy(node, mapping)
            old.update(dict.fromkeys(builder.nodes[count:], self.old[node]))
            return new

        return replace(self, graph=rewrite(self.graph, replaced), old=old), found


def mark(draft: Draft) -> Marked:
    """The graph of `draft` with marks."""
    return _Marker(draft).run()


@dataclass
class _Marker:
    draft: Draft
    moves: list[Move] = field(default_factory=list, init=False)
    old: dict[Node, Node] = field(default_factory=dict, init=False)
    mapping: dict[Node, Node] = field(default_factory=dict, init=False)

    def run(self) -> Marked:
        graph = self.draft.graph
        self.sequences = Sequences(graph, self.draft.regions, self.draft.attending, self.draft.mesh)
        self.contexts = Contexts(graph, self.draft.attending, self.draft.mesh)
        self.builder = Builder(graph.name, graph.mesh)
        for node in graph.nodes:
            for value, move in self._entering(node):
                self.mapping[value] = self._mark(self.mapping[value], move, node)
            count = len(self.builder.nodes)
            self.mapping[node] = self._copied(node)
            for move in self._leaving(node):
                self.mapping[node] = self._mark(self.mapping[node], move, node)
            self.old.update(dict.fromkeys(self.builder.nodes[count:], node))
        outputs = (each.of(self.mapping[each.node]) for each in graph.outputs)
        marked = self.builder.graph(outputs)
        moves, old = tuple(self.moves), self.old
        return Marked(self.draft, self.sequences, self.contexts, marked, moves, old)

    def _entering(self, node: Node) -> list[tuple[Node, Move]]:
        """What enters a module with this node, and the layout that the plan wants it in."""
        found = [
            (value, Move(_always(pin.layout), pin_lines(pin)))
            for value, pin in self.draft.entering.get(node, ())
        ]
        for value, statement in self.contexts.entries.get(node, ()):
            found.append((value, self._split(1, statement)))
        for value, flow in self.sequences.entries.get(node, ()):
            split = _bound(self.sequences.split, flow)
            found.append((value, Move(split, flow.region.statement.plan_line)))
        return found

    def _leaving(self, node: Node) -> list[Move]:
        """The layouts that the plan wants of a result."""
        found = []
        if node.op == GETITEM and node.args[1] == 0:
            statement = by_head(self.contexts, node.args[0])
            if statement is not None:
                found.append(self._split(TOKENS, statement))
        pin = self.draft.values.get(node)
        if pin:
            found.append(Move(_always(pin.layout), pin_lines(pin)))
        return found

    def _copied(self, node: Node) -> Node:
        if node.op == torch.ops.mesh.layout.default:
            return self.mapping[node.args[0]]
        if node.op not in ATTENTION:
            return self.builder.copy(node, self.mapping)
        operands = [self.mapping[x] for x in (node.args[0], *_single_heads(node))]
        statement = by_head(self.contexts, node)
        if statement is not None:
            move = self._split(HEADS, statement)
            operands = [self._mark(x, move, node) for x in operands]
        return with_heads(self.builder, node, self.mapping, operands)

    def _split(self, dim: int, statement: Context) -> Move:
        return Move(
            lambda given: self.contexts.split(given, dim, statement.over), statement.plan_line
        )

    def _mark(self, value: Node, move: Move, node: Node) -> Node:
        """A mark on a value, for its use in a node."""
        self.moves.append(move)
        found = emit_mark(self.builder, value, len(self.moves) - 1, node)
        self.old[found] = node
        return found


def by_head(contexts: Contexts, node: Node) -> Context | None:
    """The statement that splits attention by head, where one does."""
    statement = contexts.statement_of(node)
    return statement if statement is not None and statement.method == "ulysses" else None


def emit_mark(builder: Builder, value: Node, number: int, node: Node) -> Node:
    """The mark of a move, by its number, on a value."""
    return builder.emit(
        MOVED,
        (value, number),
        type=value.type,
        origin=node.origin,
        requires_grad=value.requires_grad,
    )


def with_heads(
    builder: Builder, node: Node, mapping: Mapping[Node, Node], operands: Sequence[Node]
) -> Node:
    """Attention on other queries, keys and values."""
    rest = (map_nodes(arg, mapping.__getitem__) for arg in node.args[3:])
    return builder.copy(node, mapping, args=(*operands, *rest))


def _single_heads(node: Node) -> tuple[Node, Node]:
    """The keys and values of attention as they are before a model repeats them."""
    k, v = node.args[1:3]
    keys, values = repeated_heads(k), repeated_heads(v)
    if keys is None or values is None or keys.tensor.shape[1] != values.tensor.shape[1]:
        return k, v
    return keys, values


def _always(layout: Layout) -> NewLayout:
    return lambda _: layout


def _bound(split: Callable[..., Layout | None], flow: object) -> NewLayout:
    return lambda given: split(given, flow)
