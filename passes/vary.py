"""Put each `vary` where the all-reduce that it becomes in the backward is cheapest.

Before:  p = mesh::embedding(wpe, arange);  x1 = add(x, vary(p, dp))
         y = linear(h, vary(w, dp, tp));    e = mesh::embedding(vary(w, dp), tokens)
After:   p = mesh::embedding(vary(wpe, dp), arange);  x1 = add(x, p)
         w1 = vary(w, dp);  y = linear(h, vary(w1, tp));  e = mesh::embedding(w1, tokens)

A value made of parameters alone is varied at the parameters, where its gradient joins the others in
a bucket, unless the parameters are much the larger. Where one value is varied over two nested sets
of axes, the larger is made from the smaller: their cotangents are summed before the last reduction.
Requires: a placed graph, not yet differentiated. Ensures: the same values, each placed by its rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.compiler.ir import INPUT, Builder, Graph, MeshOp, Node, map_nodes
from meshwright.compiler.layout import Layout
from meshwright.compiler.memory import node_bytes

VARY = MeshOp("vary")

SLACK = 1 << 20
"""Bytes by which parameters may exceed what is made of them: a message saved is worth that much."""


def vary(graph: Graph) -> Graph:
    """The graph with its `vary` nodes moved up to parameters, and chained."""
    return _chained(_hoisted(graph))


@dataclass(frozen=True, slots=True)
class _Chain:
    """What computes one varied value from parameters alone, and over which axes it is varied."""

    nodes: frozenset[Node]
    axes: tuple[str, ...]


def _hoisted(graph: Graph) -> Graph:
    users = graph.users()
    chains = {node: found for node in graph.nodes if (found := _chain(node, graph, users))}
    of = {member: chain for chain in chains.values() for member in chain.nodes}
    builder = Builder(graph.name, graph.mesh)
    mapping: dict[Node, Node] = {}
    varied: dict[tuple[Node, tuple[str, ...]], Node] = {}
    for node in graph.nodes:
        if node in chains:
            mapping[node] = mapping[node.args[0]]
        elif node in of:
            mapping[node] = _varying(node, of[node].axes, builder, mapping, varied)
        else:
            mapping[node] = builder.copy(node, mapping)
    return builder.graph(tuple((label, mapping[node]) for label, node in graph.outputs))


def _chain(node: Node, graph: Graph, users: Mapping[Node, list[Node]]) -> _Chain | None:
    """The chain behind a `vary` node, if it may be hoisted: nothing else uses it, and it is not
    much smaller than its parameters."""
    if node.op != VARY or node.args[0].op == INPUT:
        return None
    axes: tuple[str, ...] = node.kwargs["axes"]
    nodes: set[Node] = set()
    parameters: set[Node] = set()
    pending: list[Node] = [node.args[0]]
    while pending:
        each = pending.pop()
        if each.op == INPUT:
            parameters.add(each)
        elif each not in nodes:
            nodes.add(each)
            pending += [operand for operand in each.operands() if operand.requires_grad]
    if not parameters or any(not _may_vary(each, axes) for each in (*nodes, *parameters)):
        return None
    if any(user is not node and user not in nodes for each in nodes for user in users[each]):
        return None
    size = sum(node_bytes(parameter, graph) for parameter in parameters)
    return _Chain(frozenset(nodes), axes) if size <= node_bytes(node, graph) + SLACK else None


def _may_vary(node: Node, axes: tuple[str, ...]) -> bool:
    """Whether a node, and all it takes, is one tensor replicated over `axes`."""
    return node.op != VARY and all(
        isinstance(each.layout, Layout) and not set(axes) & set(each.layout.axes_used)
        for each in (node, *node.operands())
    )


def _varying(
    node: Node,
    axes: tuple[str, ...],
    builder: Builder,
    mapping: Mapping[Node, Node],
    varied: dict[tuple[Node, tuple[str, ...]], Node],
) -> Node:
    """A node of a chain, on varying parameters."""

    def operand(each: Node) -> Node:
        if each.op != INPUT or not each.requires_grad:
            return mapping[each]
        if (each, axes) not in varied:
            varied[each, axes] = _vary_node(builder, mapping[each], axes, node)
        return varied[each, axes]

    return builder.emit(
        node.op,
        map_nodes(node.args, operand),
        {key: map_nodes(value, operand) for key, value in node.kwargs.items()},
        type=node.type,
        layout=node.placed.add_varying(axes),
        origin=node.origin,
        requires_grad=node.requires_grad,
        name=node.name,
    )


def _vary_node(builder: Builder, value: Node, axes: tuple[str, ...], user: Node) -> Node:
    return builder.emit(
        VARY,
        (value,),
        {"axes": axes},
        type=value.type,
        layout=value.placed.add_varying(axes),
        origin=user.origin,
        requires_grad=value.requires_grad,
    )


def _chained(graph: Graph) -> Graph:
    """Of one value's `vary` nodes over nested sets of axes, each is made from the one before; those
    over the same axes are one."""
    wanted: dict[Node, dict[frozenset[str], Node]] = {}
    varied: dict[Node, tuple[Node, frozenset[str]]] = {}
    for node in graph.nodes:
        if node.op == VARY:
            value, before = varied.get(node.args[0], (node.args[0], frozenset()))
            axes = before | set(node.kwargs["axes"])
            varied[node] = value, axes
            wanted.setdefault(value, {}).setdefault(axes, node)
    builder = Builder(graph.name, graph.mesh)
    mapping: dict[Node, Node] = {}
    made: dict[tuple[Node, frozenset[str]], Node] = {}
    for node in graph.nodes:
        if node.op == VARY:
            mapping[node] = made[varied[node]]
            continue
        mapping[node] = builder.copy(node, mapping)
        for axes, first in sorted(wanted.get(node, {}).items(), key=lambda item: len(item[0])):
            inner = [other for value, other in made if value is node and other < axes]
            base = max(inner, key=len, default=frozenset())
            source = made[node, base] if base else mapping[node]
            rest = tuple(axis for axis in graph.mesh.names if axis in axes - base)
            made[node, axes] = _vary_node(builder, source, rest, first)
    return builder.graph(tuple((label, mapping[node]) for label, node in graph.outputs))
