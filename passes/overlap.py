"""Start collectives as early as their operands allow, and wait for them as late as their users do.

Before:  embedding: f32[8@dp, 16] = mesh::embedding(vary, tokens, -1)
         linear: f32[8@dp, 96]    = linear(embedding, vary_1)
         ne: bool[8@dp]           = ne(targets, -100)
         sum_1: i64[] partial(dp) = sum(ne)
         all_reduce: i64[]        = all_reduce(sum_1, dp)
         div: f32[] partial(dp)   = div(sum, to_copy)
After:   ne: bool[8@dp]           = ne(targets, -100)
         sum_1: i64[] partial(dp) = sum(ne)
         all_reduce: i64[]        = all_reduce(sum_1, dp)
         embedding: f32[8@dp, 16] = mesh::embedding(vary, tokens, -1)
         linear: f32[8@dp, 96]    = linear(embedding, vary_1)
         div: f32[] partial(dp)   = div(sum, to_copy)

A collective moves to just behind its operand; what it takes of integers and inputs alone moves to
the front of the graph. A gather of a weight starts when the one before it is waited for: with all
of them at the front, ranks would hold every weight whole. Generated code starts a collective there
and waits before the first user. The order of collectives is the graph's, the same on every rank.
Requires: a placed graph.
Ensures: the same nodes.
Elsewhere: DDP's hooks, Inductor's reordering for compute and communication overlap.
"""

from __future__ import annotations

import itertools

from meshwright.compiler.graph.ir import INPUT, SAVED, Graph, InputKind, Node
from meshwright.compiler.graph.transfers import moves
from meshwright.compiler.graph.weights import input_behind


def overlap(graph: Graph) -> Graph:
    """The same nodes in an order that overlaps communication with computation."""
    early = _ready_from_start(graph)
    order = [node for node in graph.nodes if node.op == INPUT]
    placed = set(order)
    followers: dict[Node, list[Node]] = {}
    gathers = [node for node in graph.nodes if moves(node) and input_behind(node)]
    following = dict(itertools.pairwise(gathers))
    for node in graph.nodes:
        if moves(node) and node not in following and node not in gathers[-1:]:
            followers.setdefault(node.args[0], []).append(node)

    def put(node: Node) -> None:
        if node in placed:
            return
        placed.add(node)
        order.append(node)
        for follower in followers.get(node, ()):
            put(follower)

    for node in order[:]:
        for follower in followers.get(node, ()):
            put(follower)
    for node in graph.nodes:
        if node in early:
            put(node)
    for node in graph.nodes:
        put(node)
        if node in following:
            for each in (*following[node].operands(), following[node]):
                put(each)
    return Graph(graph.name, graph.mesh, tuple(order), graph.outputs)


def _ready_from_start(graph: Graph) -> set[Node]:
    """What collectives need that depends on no parameter: it is computed before all else."""
    light: set[Node] = set()
    for node in graph.nodes:
        if node.op == INPUT:
            if node.args[0] != InputKind.PARAMETER:
                light.add(node)
        elif node.op != SAVED and all(n in light for n in node.operands()):
            light.add(node)
    wanted: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in light and (moves(node) or node in wanted):
            wanted.add(node)
            wanted.update(n for n in node.operands() if n in light)
    return {node for node in wanted if node.op != INPUT}
