"""Graphs as plain dictionaries, for `--json`: what the text says, field by field."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.compiler.graph.ir import Graph, Node
from meshwright.compiler.graph.text import call_text, node_type_text, op_text


def graph_data(
    graph: Graph, *, local: bool = False, nodes: Iterable[Node] | None = None
) -> dict[str, object]:
    """A graph, or only some of its nodes, with global or one rank's shapes."""
    kept = list(graph.nodes if nodes is None else nodes)
    return {
        "name": graph.name,
        "mesh": dict(graph.mesh.axes),
        "nodes": [_node(node, graph, local) for node in kept],
        "outputs": {output.label: output.node.name for output in graph.outputs},
    }


def _node(node: Node, graph: Graph, local: bool) -> dict[str, object]:
    return {
        "name": node.name,
        "op": op_text(node.op),
        "call": call_text(node),
        "operands": [operand.name for operand in node.operands()],
        "type": node_type_text(node, graph, local=local),
        "module": node.origin.module,
        "source": node.origin.source,
        "plan_line": node.origin.plan_line,
        "forward": node.origin.forward,
    }
